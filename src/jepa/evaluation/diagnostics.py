"""Whether the representation collapses, the prediction is better than a constant, and the masks reach every token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from jepa.evaluation.pictures import (
    TILE,
    enlarge,
    film,
    fit,
    frames_shown,
    heat,
    interleave,
    mask_overlay,
    montage,
    principal_colours,
    to_rgb,
)
from jepa.evaluation.types import Evaluation, Picture, Snapshot
from jepa.types import Masks, PatchGrid

HEAT_SIDE = 192
NUM_FILMS = 4
"""clips that are shown, where images are eight"""


class Diagnostics:
    """Needs no labels: numbers on the validation features and pictures of masks and feature maps."""

    judges = "features"
    protocol = (
        "diagnostics: on pooled validation features; rank is exp(entropy of normalised singular values) (RankMe), raw "
        "and centred; std is the mean over dimensions, cosine that over pairs of images; gain = 1 - prediction error / "
        "error of always predicting the mean target"
    )

    def __call__(self, snapshot: Snapshot) -> Evaluation:
        metrics = {**collapse(snapshot.val.vectors), **prediction(snapshot), **coverage_range(snapshot)}
        if len(snapshot.pictures) == 0:
            return Evaluation(metrics=metrics)
        masked = (mask_picture(snapshot), coverage_picture(snapshot)) if snapshot.masks.hides_some else ()
        return Evaluation(metrics=metrics, pictures=(*masked[:1], feature_picture(snapshot), *masked[1:]))


def collapse(vectors: Tensor) -> dict[str, float]:
    """[n, D] -> raw and centred rank, spread, mean cosine of pairs, norm."""
    vectors = vectors.double()
    deviation = vectors.std(0, correction=0)
    return {
        "collapse/rank": effective_rank(vectors),
        "collapse/rank_centred": effective_rank(vectors - vectors.mean(0)),
        "collapse/std": deviation.mean().item(),
        "collapse/std_min": deviation.min().item(),
        "collapse/cosine": mean_cosine(vectors),
        "collapse/norm": vectors.norm(dim=1).mean().item(),
    }


def effective_rank(vectors: Tensor) -> float:
    """[n, D] -> exp(-sum p log p), p the singular values divided by their sum: 1 to min(n, D) (RankMe, equation 1).

    Singular values, not variances, of the matrix as it is: subtract the mean first for the centred rank.
    """
    vectors = vectors.double()
    gram = vectors.T @ vectors if len(vectors) > vectors.shape[1] else vectors @ vectors.T
    singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    total = singular.sum()
    if total == 0:
        return 1.0
    return (singular / total).xlogy(singular / total).sum().neg().exp().item()


def mean_cosine(vectors: Tensor) -> float:
    """[n, D] -> mean over the pairs of different samples; from the sum of unit vectors, without the n x n matrix."""
    num = len(vectors)
    if num < 2:
        return 1.0
    total = torch.nn.functional.normalize(vectors, dim=1).sum(0)
    return ((total.square().sum() - num) / (num * (num - 1))).item()


def prediction(snapshot: Snapshot) -> dict[str, float]:
    """What the objective diagnosed as predict/*, and the gains over the trivial predictors: 1 is perfect."""
    metrics = {f"predict/{name}": value for name, value in snapshot.diagnosis.items()}
    error = metrics.get("predict/error")
    for gain, other in (("predict/gain", "predict/trivial_error"), ("predict/copy_gain", "predict/copy_error")):
        if error is not None and metrics.get(other):
            metrics[gain] = 1.0 - error / metrics[other]
    return metrics


def coverage(masks: Masks, grid: PatchGrid) -> tuple[Tensor, Tensor]:
    """Share of samples in which a token is context, and in which it is in any target, of one mask set: [N], [N]."""
    shape = (len(masks.context), grid.num_tokens)
    seen = torch.zeros(shape).scatter_(1, masks.context, 1.0)
    asked = torch.zeros(shape).scatter_(1, masks.targets.flatten(1), 1.0)
    return seen.mean(0), asked.mean(0)


def coverage_range(snapshot: Snapshot) -> dict[str, float]:
    """Of several mask sets the mean; nothing where no token is hidden."""
    if not snapshot.masks.hides_some:
        return {}
    sets = snapshot.masks.sets
    metrics = {"mask/context_tokens": sum(masks.context.shape[1] for masks in sets) / len(sets)}
    found = zip(*(coverage(masks, snapshot.grid) for masks in sets), strict=True)
    for name, shares in zip(("context", "target"), found, strict=True):
        share = torch.stack(shares).mean(0)
        metrics[f"mask/coverage_{name}_min"] = share.min().item()
        metrics[f"mask/coverage_{name}_max"] = share.max().item()
    return metrics


def mask_picture(snapshot: Snapshot) -> Picture:
    draw = film_rows if snapshot.pictures.shape[2] > 1 else image_rows
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
    return Picture("masks", montage(draw(snapshot, sets)), caption)


def image_rows(snapshot: Snapshot, sets: Sequence[Masks]) -> list[Tensor]:
    images = to_rgb(snapshot.pictures[:, :, 0])
    first = [masks.map(lambda indices: indices[: len(images)]) for masks in sets]
    overlays = [mask_overlay(images, masks.context, masks.targets, snapshot.grid) for masks in first]
    return interleave(*(enlarge(shown) for shown in (images, *overlays)))


def film_rows(snapshot: Snapshot, sets: Sequence[Masks]) -> list[Tensor]:
    """For each clip a row of frames, and for each mask set one with what is seen of them and asked."""
    rows = []
    for sample, clip in enumerate(snapshot.pictures[:NUM_FILMS]):
        frames, steps = film(clip), steps_shown(snapshot)
        rows.append(enlarge(frames))
        for masks in sets:
            context, targets = masks.context[sample, None], masks.targets[sample, None]
            shown = [
                mask_overlay(frame[None], context, targets, snapshot.grid, step)
                for frame, step in zip(frames, steps, strict=True)
            ]
            rows.append(enlarge(torch.cat(shown)))
    return rows


def steps_shown(snapshot: Snapshot) -> list[int]:
    """The time step of the grid that each frame shown belongs to."""
    num_frames = snapshot.pictures.shape[2]
    return [frame * snapshot.grid.t // num_frames for frame in frames_shown(num_frames)]


def feature_picture(snapshot: Snapshot) -> Picture:
    colours, shares = principal_colours(snapshot.tokens, snapshot.grid)
    share = ", ".join(f"{share:.0%}" for share in shares)
    caption = (
        "Feature maps: the three main directions of all tokens of these samples as red, green and blue "
        f"({share} of their variance). Equal colours are equal features"
    )
    if snapshot.pictures.shape[2] == 1:
        images = enlarge(to_rgb(snapshot.pictures[:, :, 0]))
        rows = interleave(images, fit(colours[:, :, 0], images.shape[-2:]))
        return Picture("features", montage(rows), f"{caption}.")
    rows = []
    for clip, maps in list(zip(snapshot.pictures, colours, strict=True))[:NUM_FILMS]:
        frames = enlarge(film(clip))
        rows += [frames, fit(maps[:, steps_shown(snapshot)].transpose(0, 1), frames.shape[-2:])]
    return Picture("features", montage(rows), f"{caption}, also over time.")


def coverage_picture(snapshot: Snapshot) -> Picture:
    rows, told = [], []
    grid, sets = snapshot.grid, snapshot.masks.sets
    for masks in sets:
        seen, asked = coverage(masks, grid)
        told.append(f"{seen.min():.0%} to {seen.max():.0%}; {asked.min():.0%} to {asked.max():.0%}")
        maps = [heat(on_scale(share, grid)) for share in (seen, asked)]  # [t, 3, h, w] each
        if grid.t == 1:
            rows.append(enlarge(torch.cat(maps), HEAT_SIDE))
        else:
            rows += [enlarge(shown[frames_shown(grid.t)], TILE) for shown in maps]
    places = "left and right" if grid.t == 1 else "one row under the other, a column for each time step"
    caption = (
        f"How often a token is context and target ({places}; of the samples {' | '.join(told)}), each on a scale from "
        "0 (dark) to the map's maximum (bright)."
    )
    return Picture("coverage", montage(rows), caption)


def on_scale(share: Tensor, grid: PatchGrid) -> Tensor:
    """[N] -> [t, h, w], the maximum 1"""
    return (share / share.max().clamp_min(1e-12)).unflatten(0, (grid.t, grid.h, grid.w))
