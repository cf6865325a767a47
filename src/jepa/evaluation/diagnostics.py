"""Whether the representation collapses, the prediction is better than a constant, and the masks reach every token."""

from __future__ import annotations

import torch
from torch import Tensor

from jepa.layers.pictures import enlarge, fit, heat, interleave, mask_overlay, montage, principal_colours, to_rgb
from jepa.types import Evaluation, PatchGrid, Picture, Snapshot

HEAT_SIDE = 192


class Diagnostics:
    """Needs no labels: numbers on the validation features and pictures of masks and feature maps."""

    protocol = (
        "diagnostics: on pooled validation features; rank is exp(entropy of normalised singular values) (RankMe), raw "
        "and centred; std is the mean over dimensions, cosine that over pairs of images; gain = 1 - prediction error / "
        "error of always predicting the mean target"
    )

    def __call__(self, snapshot: Snapshot) -> Evaluation:
        metrics = {**collapse(snapshot.val.vectors), **prediction(snapshot), **coverage_range(snapshot)}
        if len(snapshot.pictures) == 0:
            return Evaluation(metrics=metrics)
        return Evaluation(
            metrics=metrics, pictures=(mask_picture(snapshot), feature_picture(snapshot), coverage_picture(snapshot))
        )


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
    """What the objective diagnosed as predict/*, and the gain over always predicting the mean target: 1 is perfect."""
    metrics = {f"predict/{name}": value for name, value in snapshot.diagnosis.items()}
    error, trivial = metrics.get("predict/error"), metrics.get("predict/trivial_error")
    if error is not None and trivial:
        metrics["predict/gain"] = 1.0 - error / trivial
    return metrics


def coverage(snapshot: Snapshot) -> tuple[Tensor, Tensor]:
    """Share of samples in which a token is context, and in which it is in any target: [N], [N]."""
    context, targets = snapshot.masks
    shape = (len(context), snapshot.grid.num_tokens)
    seen = torch.zeros(shape).scatter_(1, context, 1.0)
    asked = torch.zeros(shape).scatter_(1, targets.flatten(1), 1.0)
    return seen.mean(0), asked.mean(0)


def coverage_range(snapshot: Snapshot) -> dict[str, float]:
    metrics = {"mask/context_tokens": float(snapshot.masks.context.shape[1])}
    for name, share in zip(("context", "target"), coverage(snapshot), strict=True):
        metrics[f"mask/coverage_{name}_min"] = share.min().item()
        metrics[f"mask/coverage_{name}_max"] = share.max().item()
    return metrics


def mask_picture(snapshot: Snapshot) -> Picture:
    images = to_rgb(snapshot.pictures)
    context, targets = (indices[: len(images)] for indices in snapshot.masks)
    overlay = mask_overlay(images, context, targets, snapshot.grid)
    share = context.shape[1] / snapshot.grid.num_tokens
    caption = (
        f"Masks as in training: bright is the context ({context.shape[1]} of {snapshot.grid.num_tokens} tokens, "
        f"{share:.0%}), coloured the {targets.shape[1]} target block(s) to predict, dark is neither."
    )
    return Picture("masks", montage(interleave(enlarge(images), enlarge(overlay))), caption)


def feature_picture(snapshot: Snapshot) -> Picture:
    images = enlarge(to_rgb(snapshot.pictures))
    colours, shares = principal_colours(snapshot.tokens, snapshot.grid)
    caption = (
        "Feature maps: the three main directions of all tokens of these images as red, green and blue "
        f"({', '.join(f'{share:.0%}' for share in shares)} of their variance). Equal colours are equal features."
    )
    return Picture("features", montage(interleave(images, fit(colours, images.shape[-2:]))), caption)


def coverage_picture(snapshot: Snapshot) -> Picture:
    seen, asked = coverage(snapshot)
    caption = (
        f"How often a token is context (left, {seen.min():.0%} to {seen.max():.0%} of the samples) and target (right, "
        f"{asked.min():.0%} to {asked.max():.0%}), both on a scale from 0 (dark) to the map's maximum (bright)."
    )
    maps = [_frames(share / share.max().clamp_min(1e-12), snapshot.grid) for share in (seen, asked)]
    tiles = [torch.cat(frames, dim=0) for frames in zip(*(m.split(1) for m in maps), strict=True)]
    return Picture("coverage", montage([enlarge(heat(pair), HEAT_SIDE) for pair in tiles]), caption)


def _frames(share: Tensor, grid: PatchGrid) -> Tensor:
    """[N] -> [t, h, w]"""
    return share.unflatten(0, (grid.t, grid.h, grid.w))
