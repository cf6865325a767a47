"""The loop between the steps: what is logged, evaluated and saved, after which steps, and what the log says."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from jepa.parallel.session import Session
from jepa.parallel.signals import Interrupt
from jepa.training import loop
from jepa.training.loop import Meter, Plan, SaveClock, TrainingError, fit
from jepa.training.step import StepOutput


def plan(**changes: Any) -> Plan:
    values = {
        "total_steps": 20, "begin_step": 0, "end_step": 11, "batch_size": 4, "micro_batch_size": 4, "dataset_size": 16,
        "seed": 0, "log_every": 2, "eval_every": 5, "save_every": 4, "clip_grad": None,
    }  # fmt: skip
    return Plan(**values | changes)


def output(loss: float, skipped: float = 0.0) -> StepOutput:
    number = torch.tensor(loss)
    return StepOutput(number, 2 * number, torch.tensor(skipped), {"extra": 3 * number})


class Notes:
    """A run that notes what it is asked for; the signal comes while step `stopped_in` is taken."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, stopped_in: int = -1, **changes: Any) -> None:
        self.plan = plan(**changes)
        self.components: Any = SimpleNamespace(session=Session(device=torch.device("cpu"), bf16=False))
        self.interrupt = Interrupt()
        self.notes: dict[str, list[Any]] = {name: [] for name in ("taken", "seen", "logged", "evaluated", "saved")}
        self.rows: list[Mapping[str, float]] = []

        def one_step(plan: Plan, components: Any, raw: Any, step: int) -> tuple[StepOutput, dict[str, float]]:
            self.notes["taken"].append((step, raw))
            self.interrupt.signum = 15 if step == stopped_in else self.interrupt.signum
            return output(float(step)), {"train/lr": 0.5}

        monkeypatch.setattr(loop, "one_step", one_step)

    def run(self, first_step: int = 0) -> int:
        return fit(self, (f"batch {step}" for step in range(first_step, 99)), self.interrupt, first_step)  # pyright: ignore

    def on_batch(self, raw: Any) -> None:
        self.notes["seen"].append(raw)

    def log_steps(self, step: int, metrics: Mapping[str, float]) -> Mapping[str, float]:
        self.notes["logged"].append(step)
        self.rows.append(metrics)
        return metrics

    def evaluate(self, step: int, interrupt: Interrupt) -> None:
        self.notes["evaluated"].append(step)

    def save(self, step: int) -> None:
        self.notes["saved"].append(step)


@pytest.mark.parametrize("first_step", [0, 3, 10])
def test_each_step_takes_its_batch_and_what_is_due_follows_it(monkeypatch: pytest.MonkeyPatch, first_step: int) -> None:
    run = Notes(monkeypatch)
    assert run.run(first_step) == 11
    steps = range(first_step, 11)
    assert run.notes["taken"] == [(step, f"batch {step}") for step in steps]
    assert run.notes["seen"] == [f"batch {step}" for step in steps]
    for name, every in (("logged", 2), ("evaluated", 5), ("saved", 4)):
        assert run.notes[name] == [done for done in range(first_step + 1, 12) if done % every == 0 or done == 11]


def test_a_signal_ends_the_run_after_its_step_and_a_save(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Notes(monkeypatch, stopped_in=6)
    assert run.run() == 7
    assert run.notes["saved"] == [4, 7]
    assert run.notes["evaluated"] == [5]
    assert run.interrupt.signum_on_all_ranks == 15


def test_the_clock_saves_between_the_steps_that_are_due(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Notes(monkeypatch, save_every=100, save_seconds=25.0)
    monkeypatch.setattr("jepa.training.loop.time.monotonic", lambda: 10.0 * len(run.notes["taken"]))
    assert run.run() == 11
    assert run.notes["saved"] == [3, 6, 9, 11]


def test_slow_writing_makes_the_clock_strike_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("jepa.training.loop.time.monotonic", lambda: now)
    clock = SaveClock(60.0)
    struck = []
    for second in range(2000):
        now += 1.0
        if clock.strikes():
            struck.append(second)
            with clock.saving():
                now += 10.0  # 2 % of 500 seconds
    assert struck[0] == 59
    assert {b - a for a, b in pairwise(struck)} == {500}


def test_without_minutes_the_clock_never_strikes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SaveClock(math.inf)
    monkeypatch.setattr("jepa.training.loop.time.monotonic", lambda: 1e12)
    assert not clock.strikes()


def test_a_line_of_the_log_is_the_mean_of_the_steps_since_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Notes(monkeypatch)
    run.run()
    losses = [row["train/loss"] for row in run.rows]
    assert losses == [0.5, 2.5, 4.5, 6.5, 8.5, 10.0]
    for row, loss in zip(run.rows, losses, strict=True):
        assert row["train/grad_norm"] == pytest.approx(2 * loss)
        assert row["train/extra"] == pytest.approx(3 * loss)
        assert row["train/lr"] == 0.5
        assert row["perf/samples_per_s"] > 0
        assert 0 <= row["perf/data_wait"] <= 1


def test_steps_that_were_not_taken_are_counted_and_left_out_of_the_means() -> None:
    meter = Meter(plan())
    for loss, skipped in ((1.0, 0.0), (99.0, 1.0), (3.0, 0.0), (float("nan"), 1.0)):
        meter.outputs.append(output(loss, skipped))
    values = meter.read()
    assert (values["train/loss"], values["train/skipped"]) == (2.0, 2.0)


@pytest.mark.parametrize("per_line", [1, 3, 7])
def test_twenty_steps_in_a_row_that_were_not_taken_end_the_run_and_nineteen_do_not(per_line: int) -> None:
    def add(meter: Meter, number: int, skipped: float) -> None:
        for _ in range(number):
            meter.outputs.append(output(1.0, skipped))
        meter.read()

    meter, lines = Meter(plan(total_steps=1000)), -(-20 // per_line)
    for _ in range(lines - 1):
        add(meter, per_line, 1.0)
    add(meter, 1, 0.0)
    for _ in range(lines - 1):
        add(meter, per_line, 1.0)
    with pytest.raises(TrainingError, match="not finite"):
        add(meter, per_line, 1.0)


@pytest.mark.parametrize(("step", "epoch", "samples"), [(0, 0.0, 0), (2, 0.5, 8), (8, 2.0, 32)])
def test_a_position_is_told_in_epochs_and_samples(step: int, epoch: float, samples: int) -> None:
    assert plan().position(step) == {"epoch": epoch, "samples": samples}


def test_a_run_of_whole_epochs_ends_at_a_whole_epoch_though_samples_are_left_over() -> None:
    uneven = replace(plan(), dataset_size=15, batch_size=4)
    assert uneven.position(3 * 100) == {"epoch": 100.0, "samples": 1200}
