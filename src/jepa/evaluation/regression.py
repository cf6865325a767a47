"""Regression probe: ridge regression from frozen features to the quantities of a data set."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from jepa.evaluation.probe import SELECTION_SHARE, feature_pairs, read_by, select, selection_split, standardise
from jepa.evaluation.types import Evaluation, Features, Snapshot
from jepa.parallel.device import double
from jepa.types import Readout

L2_GRID = tuple(10.0**power for power in range(1, -7, -1))
MIN_SAMPLES = 10
"""Samples that each part needs."""


class Regression:
    """One probe for each group of quantities, which share the part of the name before the slash."""

    judges = "features"

    def __init__(self, *, readout: Readout = "mean") -> None:
        self.readout = readout
        self.protocol = (
            "regression, where the data set has measured quantities: ridge regression on standardised features in "
            f"closed form; L2 weight chosen from {L2_GRID[0]:g} ... {L2_GRID[-1]:g} on {SELECTION_SHARE:.0%} of the "
            f"training samples, then fitted on all{read_by(readout)}; R^2 in percent on the validation samples, the "
            "mean over the quantities of a group"
        )

    def __call__(self, snapshot: Snapshot) -> Evaluation:
        groups: dict[str, list[int]] = {}
        for column, name in enumerate(snapshot.quantities):
            groups.setdefault(name.partition("/")[0], []).append(column)
        metrics = {}
        for prefix, *pair in feature_pairs(snapshot):
            train, val = (part.by(self.readout) for part in pair)
            for group, columns in groups.items():
                parts = with_targets(train, columns), with_targets(val, columns)
                if min(len(part.vectors) for part in parts) >= MIN_SAMPLES:
                    metrics[f"{prefix}/{group}_r2"] = ridge_score(*parts)
        return Evaluation(metrics=metrics)


def with_targets(features: Features, columns: list[int]) -> Features:
    """The samples for which these quantities are all finite, with them as targets, in float64."""
    vectors, targets = double(features.vectors), double(targets_of(features)[:, columns])
    rows = targets.isfinite().all(1)
    return select(Features(vectors, features.labels.to(vectors.device), targets), rows)


def ridge_score(train: Features, val: Features) -> float:
    """R^2 in percent at the L2 weight with the best score on the selection samples (the stronger of equals)."""
    fitted, selection = selection_split(train)
    scores = [r2(predicted, targets_of(selection)) for predicted in ridge(fitted, selection, L2_GRID)]
    best = scores.index(max(scores))
    return r2(ridge(train, val, L2_GRID[best : best + 1])[0], targets_of(val))


def targets_of(features: Features) -> Tensor:
    assert features.targets is not None
    return features.targets


def ridge(train: Features, val: Features, weights: Sequence[float]) -> list[Tensor]:
    """Predictions [n, Q] for the validation samples at each l2: the minimum of mean |error|^2 + l2 |weight|^2."""
    train, val = standardise(train, val)
    mean = targets_of(train).mean(0)
    variances, directions = torch.linalg.eigh(train.vectors.T @ train.vectors / len(train.vectors))
    moments = directions.T @ (train.vectors.T @ (targets_of(train) - mean)) / len(train.vectors)  # [D, Q]
    rotated = val.vectors @ directions
    return [rotated @ (moments / (variances.clamp_min(0)[:, None] + l2)) + mean for l2 in weights]


def r2(predicted: Tensor, targets: Tensor) -> float:
    """[n, Q], [n, Q] -> 100 (1 - squared error / variance), the mean over the quantities that vary"""
    total = (targets - targets.mean(0)).square().sum(0)
    residual = (targets - predicted).square().sum(0)
    varies = total > 0
    return 100.0 * (1 - residual[varies] / total[varies]).mean().item() if varies.any() else 0.0
