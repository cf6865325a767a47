"""Figures about measurements: intervals of shares and means, rank correlation. Without torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

NORMAL_QUANTILE = 1.959964
"""Quantile of the standard normal distribution for a two-sided 95 % interval."""


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % score interval of a share, from 0 to 1, of `count` independent trials (Wilson 1927)."""
    spread = NORMAL_QUANTILE**2 / count
    centre = (share + spread / 2) / (1 + spread)
    half = NORMAL_QUANTILE * math.sqrt(share * (1 - share) / count + spread / (4 * count)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean of independent values, by the normal distribution."""
    mean, half = float(np.mean(values)), float(NORMAL_QUANTILE * np.std(values) / math.sqrt(len(values)))
    return mean - half, mean + half


def spearman(first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray) -> float:
    """Rank correlation; equal values share their mean rank. nan for no values, and if all of one side are equal."""
    if not len(first):
        return math.nan
    ranks = []
    for values in (first, second):
        _, places, counts = np.unique(np.asarray(values, dtype=float), return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[places])
    return float(np.corrcoef(*ranks)[0, 1]) if min(map(np.ptp, ranks)) else math.nan
