"""The printed time that a training takes, or has left."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from jepa.reports.text import duration
from jepa.resources.measured import REPEAT_SECONDS, REPEATS, _seconds
from jepa.training.progress import Progress


def times_left(capsys: pytest.CaptureFixture[str], rates: list[float]) -> list[str]:
    """The printed times left in a run of 100 steps of 8 samples; `rates` are samples/s of every five steps."""
    with Progress(0, 100, 8) as progress:
        for number, rate in enumerate(rates, 1):
            progress.show(5 * number, {"perf/samples_per_s": rate, "train/loss": 1.0, "perf/data_wait": 0.0})
    return [line.rpartition("| ")[2] for line in capsys.readouterr().err.splitlines()]


def test_steps_that_warm_up_do_not_count_for_the_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    assert times_left(capsys, [0.1, 8.0, 8.0]) == [f"{duration(95 * 80)} left", "1 min 30 s left", "1 min 25 s left"]


def test_the_time_left_follows_a_machine_that_becomes_slow(capsys: pytest.CaptureFixture[str]) -> None:
    first, second, third = times_left(capsys, [8.0, 8.0, 4.0])
    assert (first, second) == ("1 min 35 s left", "1 min 30 s left")
    assert third == f"{duration(85 * 1.1)} left"


@pytest.mark.parametrize(
    ("seconds", "expected"), [([0.2, 0.01, 0.05], 0.01), ([REPEAT_SECONDS + 1, 0.01], REPEAT_SECONDS + 1)]
)
def test_the_cost_of_a_step_is_its_shortest_time(
    seconds: list[float], expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    durations = iter([*seconds, *[9.0] * REPEATS])

    def work() -> None:
        clock[0] += next(durations)

    alone = SimpleNamespace(device=SimpleNamespace(type="cpu"), gather=lambda value: [value])
    assert _seconds(work, alone) == pytest.approx(expected)


def test_durations_below_a_second_are_not_called_zero() -> None:
    assert [duration(seconds) for seconds in (0, 0.02, 0.99, 1, 61)] == [
        "0 s",
        "under 1 s",
        "under 1 s",
        "1 s",
        "1 min 01 s",
    ]
