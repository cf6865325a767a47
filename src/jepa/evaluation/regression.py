"""Regression probe: ridge regression from frozen features to the numbers that a data set knows of its samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from jepa.evaluation.probe import SELECTION_SHARE, held_out, probed, select, standardise
from jepa.evaluation.types import Evaluation, Features, Snapshot

L2_GRID = tuple(10.0**power for power in range(1, -7, -1))
LEAST_SAMPLES = 10


class Regression:
    """One probe for each group of quantities, the part of their names before the slash; silent where there are none."""

    judges = "features"

    def __init__(self) -> None:
        self.protocol = (
            "regression, where the data set has measured quantities: ridge regression on standardised features in "
            f"closed form; L2 weight chosen from {L2_GRID[0]:g} ... {L2_GRID[-1]:g} on {SELECTION_SHARE:.0%} of the "
            "training samples, then fitted on all; R^2 in percent on the validation samples, the mean over the "
            "quantities of a group"
        )

    def __call__(self, snapshot: Snapshot) -> Evaluation:
        groups: dict[str, list[int]] = {}
        for column, name in enumerate(snapshot.quantities):
            groups.setdefault(name.partition("/")[0], []).append(column)
        metrics = {}
        for prefix, train, val in probed(snapshot):
            for group, columns in groups.items():
                parts = known(train, columns), known(val, columns)
                if min(len(part.vectors) for part in parts) >= LEAST_SAMPLES:
                    metrics[f"{prefix}/{group}_r2"] = ridge_score(*parts)
        return Evaluation(metrics=metrics)


def known(features: Features, columns: list[int]) -> Features:
    """The samples of which all these quantities are known, with them as targets, float64."""
    if features.targets is None:
        return features._replace(vectors=features.vectors[:0])
    targets = features.targets[:, columns].double()
    rows = targets.isfinite().all(1)
    return select(Features(features.vectors.double(), features.labels, targets), rows)


def ridge_score(train: Features, val: Features) -> float:
    """R^2 in percent, at the L2 weight with the best score on held-out training samples (the stronger of equals)."""
    fitted, judged = (select(train, rows) for rows in held_out(len(train.labels)))
    found = [r2(answers, targets_of(judged)) for answers in ridge(fitted, judged, L2_GRID)]
    best = max(range(len(found)), key=found.__getitem__)
    return r2(ridge(train, val, L2_GRID[best : best + 1])[0], targets_of(val))


def targets_of(features: Features) -> Tensor:
    assert features.targets is not None
    return features.targets


def ridge(train: Features, val: Features, weights: Sequence[float]) -> list[Tensor]:
    """Answers [n, Q] for the validation samples at each l2, at the minimum of mean |error|^2 + l2 |weight|^2."""
    train, val = standardise(train, val)
    mean = targets_of(train).mean(0)
    num = len(train.vectors)
    variances, directions = torch.linalg.eigh(train.vectors.T @ train.vectors / num)
    moments = directions.T @ (train.vectors.T @ (targets_of(train) - mean)) / num  # [D, Q]
    turned = val.vectors @ directions
    return [turned @ (moments / (variances.clamp_min(0)[:, None] + l2)) + mean for l2 in weights]


def r2(answers: Tensor, targets: Tensor) -> float:
    """[n, Q], [n, Q] -> 100 (1 - squared error / variance), the mean over the quantities that vary."""
    total = (targets - targets.mean(0)).square().sum(0)
    left = (targets - answers).square().sum(0)
    varies = total > 0
    return 100.0 * (1 - left[varies] / total[varies]).mean().item() if varies.any() else 0.0
