"""LiDAR and alpha-ReQ: criteria without labels to choose between checkpoints and between runs."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from jepa.evaluation.probe import exp_entropy
from jepa.evaluation.types import Evaluation, Snapshot
from jepa.parallel.device import double
from jepa.types import Within

DELTA = 1e-4
"""Added to the within-class scatter (LiDAR, section 4)."""
FIRST_RANK, LAST_RANK = 5, 100
"""Ranks of the eigenvalues that the power law is fitted to; the first few never follow it."""
USED_SHARE = 0.75
"""Share of the positive eigenvalues that may be used: the last ones drop because the dimension is finite."""
MIN_POINTS = 5


class Selection:
    """LiDAR on random crops, the same at each evaluation and of equal sizes in all runs; alpha on the features."""

    judges = "features"

    def __init__(
        self, *, num_views: Annotated[int, Within(2)], num_viewed: Annotated[int, Within(2)],
        view_scale: Annotated[tuple[float, float], Within(0, 1, above=True)],
    ) -> None:  # fmt: skip
        self.num_views = num_views
        self.num_viewed = num_viewed
        self.view_scale = view_scale
        self.protocol = (
            f"selection without labels: select/lidar (higher should be better) is the effective rank of "
            f"between-image over within-image scatter of {num_views} random crops ({view_scale[0]:g} to "
            f"{view_scale[1]:g} of the area, mirrored as in training) of at most {num_viewed} validation samples; "
            f"select/alpha is the exponent of the power law of the eigenvalues of the features' covariance from the "
            f"{FIRST_RANK}th on; near 1 is best"
        )

    def __call__(self, snapshot: Snapshot) -> Evaluation:
        """Reports nothing without views, as for raw pixels."""
        if snapshot.views is None or len(snapshot.views) < 2:
            return Evaluation()
        alpha = power_law(spectrum(snapshot.val.vectors))
        return Evaluation({"select/lidar": lidar(snapshot.views)} | ({} if alpha is None else {"select/alpha": alpha}))


def lidar(views: Tensor) -> float:
    """[n, q, D] -> the effective rank of linear discriminant analysis with images as classes: 1 to min(n - 1, D)

    exp of the entropy of the eigenvalues of Sw^-1/2 Sb Sw^-1/2 (Thilak et al. 2023, arXiv:2312.04000, equations 1-3).
    """
    views = double(views)
    means = views.mean(1)  # [n, D]
    within, between = (views - means[:, None]).flatten(0, 1), means - means.mean(0)
    values, axes = torch.linalg.eigh(within.T @ within / len(within))
    whitened = between @ (axes / (values.clamp_min(0) + DELTA).sqrt())  # [n, D]
    return exp_entropy(torch.linalg.svdvals(whitened).square())


def spectrum(vectors: Tensor) -> Tensor:
    """[n, D] -> eigenvalues of the covariance in descending order; at most min(n - 1, D) of them are above 0"""
    centred = double(vectors) - double(vectors).mean(0)
    values = torch.linalg.svdvals(centred).square() / len(vectors)
    return values[: max(1, len(vectors) - 1)]


def power_law(values: Tensor) -> float | None:
    """[r] in descending order -> a in value ~ rank^-a (alpha-ReQ, Agrawal et al. 2022, section 3).

    Least squares of the logarithms, with the same weight for each octave; None if too few eigenvalues are above 0.
    """
    last = min(LAST_RANK, round(USED_SHARE * int((values > 1e-10 * values[0]).sum())))
    first = max(1, min(FIRST_RANK, last // 3))
    if last - first + 1 < MIN_POINTS:
        return None
    ranks = torch.arange(first, last + 1, dtype=torch.double)
    x, y, weights = ranks.log(), double(values[first - 1 : last]).log(), 1 / ranks
    x, y = (line - (weights * line).sum() / weights.sum() for line in (x, y))
    return (-(weights * x * y).sum() / (weights * x * x).sum()).item()
