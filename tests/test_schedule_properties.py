"""What holds for every schedule at every length of a run: ends, bounds, no jumps."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa.schedules import Constant, Cosine, WarmupStableDecay

CHOICES = [(Cosine, {}), (Constant, {}), (WarmupStableDecay, {"decay_ratio": 0.3})]


def schedule(kind: type, **changes: Any) -> Any:
    values = {
        "total_steps": 100, "steps_per_epoch": 10, "lr": 2.0, "warmup_ratio": 0.1, "warmup_epochs": None,
        "start_ratio": 0.25, "final_ratio": 1.0, "weight_decay": 0.04, "final_weight_decay": 0.4,
    }  # fmt: skip
    return kind(**values | changes)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    choice=st.sampled_from(CHOICES),
    total_steps=st.integers(1, 60),
    warmup_ratio=st.sampled_from([0.0, 0.1, 0.5]),
    start_ratio=st.floats(0, 1),
    final_ratio=st.floats(0, 1),
)
def test_the_rate_rises_to_lr_never_above_and_falls_to_its_end(
    choice: tuple, total_steps: int, warmup_ratio: float, start_ratio: float, final_ratio: float
) -> None:
    kind, more = choice
    final_ratio = 1.0 if kind is Constant else final_ratio
    if round(warmup_ratio * total_steps) >= total_steps:
        return
    made = schedule(
        kind,
        total_steps=total_steps,
        warmup_ratio=warmup_ratio,
        start_ratio=start_ratio,
        final_ratio=final_ratio,
        **more,
    )
    rates, warmup = [made.lr_at(step) for step in range(total_steps + 1)], made.warmup_steps
    assert rates[0] == pytest.approx(2.0 * (start_ratio if warmup else 1.0))
    assert rates[warmup] == pytest.approx(2.0)
    assert rates[-1] == made.lr_at(total_steps + 7) == pytest.approx(2.0 * final_ratio)
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)


@pytest.mark.parametrize("decay_ratio", [1e-4, 0.001, 0.004])
def test_a_decay_lasts_one_step_at_least(decay_ratio: float) -> None:
    made = schedule(WarmupStableDecay, decay_ratio=decay_ratio, final_ratio=0.1)
    assert made.lr_at(99) == 2.0
    assert made.lr_at(100) == pytest.approx(0.2)


def test_a_decay_longer_than_what_follows_the_warm_up_begins_with_its_end() -> None:
    made = schedule(WarmupStableDecay, decay_ratio=1.0, final_ratio=0.0, warmup_ratio=0.5)
    assert [made.lr_at(step) for step in (50, 75, 100)] == pytest.approx([2.0, 1.0, 0.0])


def test_weight_decay_is_half_a_cosine_over_the_whole_run() -> None:
    made = schedule(Cosine)
    for step in range(101):
        expected = 0.4 - 0.36 * (1 + math.cos(math.pi * step / 100)) / 2
        assert made.weight_decay_at(step) == pytest.approx(expected)


def test_a_run_of_one_step_is_a_run() -> None:
    assert schedule(Cosine, total_steps=1, warmup_ratio=0.0).lr_at(0) == 2.0
