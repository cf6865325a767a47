"""Diagnostics: collapse of the representation, gain over trivial predictors, coverage of the masks."""

from __future__ import annotations

import torch
from torch import Tensor

from jepa.evaluation import pictures
from jepa.evaluation.pictures import enlarge, frame_indices, frame_tiles, heatmap, montage, rows_of_tiles
from jepa.evaluation.probe import exp_entropy
from jepa.evaluation.types import Evaluation, Picture, Snapshot
from jepa.parallel.device import double
from jepa.types import Masks, PatchGrid

HEATMAP_SIDE = 192
"""Smallest side in pixels of a heat map of images."""


class Diagnostics:
    """Metrics of the validation features, and pictures of masks and feature maps; needs no labels."""

    judges = "features"
    protocol = (
        "diagnostics: on pooled validation features; rank is exp(entropy of normalised singular values) (RankMe), raw "
        "and centred; std is the mean over dimensions, cosine the mean over pairs of images; gain is 1 - "
        "prediction error / error of always predicting the mean target"
    )

    def __call__(self, snapshot: Snapshot) -> Evaluation:
        metrics = {**collapse(snapshot.val.vectors), **prediction(snapshot), **coverage_range(snapshot)}
        if len(snapshot.pictures) == 0:
            return Evaluation(metrics=metrics)
        if not snapshot.masks.hides_some:
            return Evaluation(metrics, (feature_picture(snapshot),))
        return Evaluation(metrics, (mask_picture(snapshot), feature_picture(snapshot), coverage_picture(snapshot)))


def collapse(vectors: Tensor) -> dict[str, float]:
    """[n, D] -> raw and centred rank, standard deviation, mean cosine of pairs, norm"""
    vectors = double(vectors)
    deviation = vectors.std(0, correction=0)
    return {
        "collapse/rank": effective_rank(vectors), "collapse/rank_centred": effective_rank(vectors - vectors.mean(0)),
        "collapse/std": deviation.mean().item(), "collapse/std_min": deviation.min().item(),
        "collapse/cosine": mean_cosine(vectors), "collapse/norm": vectors.norm(dim=1).mean().item(),
    }  # fmt: skip


def effective_rank(vectors: Tensor) -> float:
    """[n, D] -> exp(-sum p log p), p the singular values divided by their sum: 1 to min(n, D) (RankMe, equation 1)"""
    vectors = double(vectors)
    gram = vectors.T @ vectors if len(vectors) > vectors.shape[1] else vectors @ vectors.T
    return exp_entropy(torch.linalg.eigvalsh(gram).clamp_min(0).sqrt())


def mean_cosine(vectors: Tensor) -> float:
    """[n, D] -> mean over the pairs of different samples, computed without the n x n matrix"""
    num = len(vectors)
    if num < 2:
        return 1.0
    total = torch.nn.functional.normalize(vectors, dim=1).sum(0)
    return ((total.square().sum() - num) / (num * (num - 1))).item()


def prediction(snapshot: Snapshot) -> dict[str, float]:
    """The diagnosis of the objective as predict/*, and the gains over the trivial predictors: 1 is perfect."""
    metrics = {f"predict/{name}": value for name, value in snapshot.diagnosis.items()}
    error = metrics.get("predict/error")
    for gain, other in (("predict/gain", "predict/trivial_error"), ("predict/copy_gain", "predict/copy_error")):
        if error is not None and metrics.get(other):
            metrics[gain] = 1.0 - error / metrics[other]
    return metrics


def coverage(masks: Masks, grid: PatchGrid) -> Tensor:
    """Shares of samples [2, N] in which a token is context, and in which it is in any target, of one mask set."""
    empty = torch.zeros(len(masks.context), grid.num_tokens)
    return torch.stack([empty.scatter(1, tokens.flatten(1), 1.0).mean(0) for tokens in masks])


def coverage_range(snapshot: Snapshot) -> dict[str, float]:
    """The mean over the mask sets; empty if no token is hidden."""
    if not snapshot.masks.hides_some:
        return {}
    sets = snapshot.masks.sets
    metrics = {"mask/context_tokens": sum(masks.context.shape[1] for masks in sets) / len(sets)}
    shares = torch.stack([coverage(masks, snapshot.grid) for masks in sets]).mean(0)  # [2, N]
    for name, share in zip(("context", "target"), shares, strict=True):
        metrics[f"mask/coverage_{name}_min"] = share.min().item()
        metrics[f"mask/coverage_{name}_max"] = share.max().item()
    return metrics


def mask_picture(snapshot: Snapshot) -> Picture:
    sets, num_tokens = snapshot.masks.sets, snapshot.grid.num_tokens
    counts = ", ".join(str(masks.context.shape[1]) for masks in sets)
    share = ", ".join(f"{masks.context.shape[1] / num_tokens:.0%}" for masks in sets)
    blocks = ", ".join(str(masks.targets.shape[1]) for masks in sets)
    caption = (
        f"Masks as in training: bright is the context ({counts} of {num_tokens} tokens, {share}), coloured the "
        f"{blocks} target block(s) to predict, dark is neither."
    )
    if len(sets) > 1:
        caption += f" Each sample has {len(sets)} mask sets, one under the other."
    frames = frame_tiles(snapshot.pictures)
    tiles = (frames, *(mask_tiles(frames, masks, snapshot) for masks in sets))
    return Picture("masks", montage(rows_of_tiles(*map(enlarge, tiles))), caption)


def mask_tiles(frames: Tensor, masks: Masks, snapshot: Snapshot) -> Tensor:
    """[n, F, 3, h, w] -> [n, F, 3, h, w] with the masks of each frame's time step"""
    context, targets = (tokens[: len(frames)] for tokens in masks)
    overlays = [
        pictures.mask_overlay(images, context, targets, snapshot.grid, step)
        for images, step in zip(frames.unbind(1), frame_steps(snapshot), strict=True)
    ]
    return torch.stack(overlays, dim=1)


def frame_steps(snapshot: Snapshot) -> list[int]:
    """The time step of the grid of each frame in a picture."""
    num_frames = snapshot.pictures.shape[2]
    return [frame * snapshot.grid.t // num_frames for frame in frame_indices(num_frames)]


def feature_picture(snapshot: Snapshot) -> Picture:
    colours, shares = pictures.principal_colours(snapshot.tokens, snapshot.grid)
    frames = enlarge(frame_tiles(snapshot.pictures))
    maps = colours[:, :, frame_steps(snapshot)].transpose(1, 2)  # [n, F, 3, h, w]
    caption = (
        "Feature maps: the first three principal components of all tokens of these samples as red, green and blue "
        f"({', '.join(f'{share:.0%}' for share in shares)} of their variance). Equal colours are equal features"
        f"{', also over time' if snapshot.pictures.shape[2] > 1 else ''}."
    )
    rows = rows_of_tiles(frames, pictures.resize_nearest(maps, frames.shape[-2:]))
    return Picture("features", montage(rows), caption)


def coverage_picture(snapshot: Snapshot) -> Picture:
    rows, ranges = [], []
    grid = snapshot.grid
    for masks in snapshot.masks.sets:
        shares = coverage(masks, grid)
        ranges.append("; ".join(f"{share.min():.0%} to {share.max():.0%}" for share in shares))
        scaled = shares / shares.amax(dim=1, keepdim=True).clamp_min(1e-12)
        maps = list(map(heatmap, scaled.unflatten(1, (grid.t, grid.h, grid.w))))  # [t, 3, h, w] each
        if grid.t == 1:
            rows.append(enlarge(torch.cat(maps), HEATMAP_SIDE))
        else:
            rows += [enlarge(steps[frame_indices(grid.t)]) for steps in maps]
    layout = "left and right" if grid.t == 1 else "one row under the other, a column for each time step"
    caption = (
        f"How often a token is context and target ({layout}; in {' | '.join(ranges)} of the samples), each on a scale "
        "from 0 (dark) to the map's maximum (bright)."
    )
    return Picture("coverage", montage(rows), caption)
