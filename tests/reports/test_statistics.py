"""Intervals and rank correlations against published figures and SciPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from jepa.reports.statistics import mean_interval, spearman, wilson


@pytest.mark.parametrize(
    ("wins", "count", "expected"),
    [  # Wilson's score interval without continuity correction, from Newcombe 1998, table I, and by hand
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
        (29, 29, (0.8830, 1.0)),
    ],
)
def test_intervals_are_those_of_wilson(wins: int, count: int, expected: tuple[float, float]) -> None:
    np.testing.assert_allclose(wilson(wins / count, count), expected, atol=1e-4)


@pytest.mark.parametrize(("share", "num"), [(0.0, 10), (0.5, 100), (0.97, 2000), (1.0, 7)])
def test_the_ends_of_the_interval_lie_as_far_as_chance_allows(share, num):
    low, high = wilson(share, num)
    assert low <= share <= high
    for end in (low, high):
        distance = 1.959964 * math.sqrt(end * (1 - end) / num)
        assert abs(share - end) == pytest.approx(distance, abs=1e-6) or end in (0.0, 1.0)


def test_the_interval_of_a_mean_is_that_of_its_standard_error() -> None:
    low, high = mean_interval([1.0, 2.0, 3.0, 6.0])
    assert (low + high) / 2 == pytest.approx(3)
    assert high - low == pytest.approx(2 * 1.959964 * math.sqrt(3.5 / 4))


@given(st.lists(st.tuples(st.integers(-3, 3), st.floats(-9, 9, width=16)), min_size=2, max_size=12))
def test_spearman_agrees_with_scipy(pairs):
    first, second = zip(*pairs, strict=True)
    if len(set(first)) == 1 or len(set(second)) == 1:
        assert np.isnan(spearman(first, second))
    else:
        assert spearman(first, second) == pytest.approx(stats.spearmanr(first, second).statistic)


def test_of_nothing_there_is_no_rank_correlation() -> None:
    assert math.isnan(spearman([], []))
