"""Schedules are pure functions of the step."""

import math

import pytest

from jepa.schedules import Constant, Cosine, WarmupStableDecay, cosine, linear

COMMON = {
    "total_steps": 1000,
    "steps_per_epoch": 10,
    "lr": 2.0,
    "warmup_ratio": 0.1,
    "warmup_epochs": None,
    "start_ratio": 0.25,
    "final_ratio": 0.01,
    "weight_decay": 0.04,
    "final_weight_decay": 0.4,
}


def test_linear_and_cosine_meet_their_ends_and_stay_there():
    assert [linear(s, 10, 1.0, 3.0) for s in (0, 5, 10, 99)] == [1.0, 2.0, 3.0, 3.0]
    assert [cosine(s, 10, 1.0, 3.0) for s in (0, 5, 10, 99)] == pytest.approx([1.0, 2.0, 3.0, 3.0])


def test_warm_up_is_linear_from_start_ratio_to_the_full_rate():
    schedule = Cosine(**COMMON)
    assert schedule.lr_at(0) == pytest.approx(0.5)
    assert schedule.lr_at(50) == pytest.approx(1.25)
    assert schedule.lr_at(100) == pytest.approx(2.0)


def test_cosine_follows_the_closed_form_after_warm_up():
    schedule = Cosine(**COMMON)
    for step in (100, 317, 550, 999):
        share = (step - 100) / 900
        assert schedule.lr_at(step) == pytest.approx(0.02 + 1.98 * (1 + math.cos(math.pi * share)) / 2)


def test_constant_keeps_the_rate_to_the_end():
    schedule = Constant(**COMMON | {"final_ratio": 1.0})
    assert {schedule.lr_at(step) for step in (100, 500, 999)} == {2.0}


def test_constant_refuses_another_final_rate():
    with pytest.raises(ValueError, match="final_ratio"):
        Constant(**COMMON)


def test_warmup_stable_decay_is_flat_then_linear():
    schedule = WarmupStableDecay(**COMMON, decay_ratio=0.2)
    assert {schedule.lr_at(step) for step in (100, 500, 800)} == {2.0}
    assert schedule.lr_at(900) == pytest.approx((2.0 + 0.02) / 2)
    assert schedule.lr_at(1000) == pytest.approx(0.02)


def test_weight_decay_goes_from_its_first_to_its_last_value():
    schedule = Cosine(**COMMON)
    assert schedule.weight_decay_at(0) == pytest.approx(0.04)
    assert schedule.weight_decay_at(500) == pytest.approx(0.22)
    assert schedule.weight_decay_at(1000) == pytest.approx(0.4)


def test_warm_up_in_epochs_replaces_the_share():
    assert Cosine(**COMMON | {"warmup_epochs": 5}).warmup_steps == 50


@pytest.mark.parametrize("change", [{"warmup_epochs": 100}, {"warmup_ratio": 1.0}, {"warmup_ratio": -0.1}])
def test_a_warm_up_as_long_as_the_run_is_refused(change):
    with pytest.raises(ValueError, match="warm-up"):
        Cosine(**COMMON | change)


def test_a_run_without_steps_is_refused():
    with pytest.raises(ValueError, match="0 steps"):
        Cosine(**COMMON | {"total_steps": 0})
