"""The number of threads: the fastest is taken and kept, what the user sets stays."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_agent import agent

from jepa.resources import threads
from jepa.runs import checkpoint

RUN = ("steps=2", "save_every=1", "evaluator=[]", "log_every=1")


@pytest.fixture(autouse=True)
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of threads that are set, on four cores, without setting them."""
    numbers: list[int] = []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "num_cores", lambda: 4)
    monkeypatch.setattr(torch, "set_num_threads", numbers.append)
    return numbers


def kept(folder: Path) -> int | None:
    return checkpoint.peek(folder / "checkpoints/last").get("threads")


@pytest.mark.parametrize(
    ("seconds", "expected"), [({1: 1.04, 2: 1.0, 4: 5.0}, 1), ({1: 2.0, 2: 1.0, 4: 0.98}, 2), ({1: 3.0, 2: 2.0}, 2)]
)
def test_the_smallest_number_that_is_about_as_fast_as_the_fastest_is_taken(
    seconds: dict[int, float], expected: int
) -> None:
    assert threads.fastest(seconds) == expected


def test_time_that_threads_wait_for_each_other_counts_though_the_shortest_step_hides_it(
    monkeypatch: pytest.MonkeyPatch, chosen: list[int]
) -> None:
    clock, count = [0.0], [0]
    monkeypatch.setattr(threads.time, "perf_counter", lambda: clock[0])

    def train() -> None:
        count[0] += 1
        clock[0] += 0.02 if chosen[-1] == 1 else 0.2 if count[0] % 4 == 0 else 0.01

    assert threads.fastest(threads.in_turns(train, [1, 2])) == 1
    assert clock[0] < 2 * threads.SECONDS


def test_a_resumed_run_takes_the_number_that_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(threads, "time_threads", lambda run, cores: {1: 0.2, 2: 0.1, 4: 0.3})
    agent(tmp_path / "x", *RUN).train()
    assert (chosen, kept(tmp_path / "x")) == ([2], 2)
    assert "threads 2, the fastest now: a step takes 200.0 ms with 1, 100.0 ms with 2" in capsys.readouterr().err
    monkeypatch.setattr(threads, "time_threads", lambda run, cores: {1: 0.1, 2: 0.2})
    agent(tmp_path / "x", *RUN, "steps=4").train()
    assert (chosen, kept(tmp_path / "x")) == ([2, 2], 2)
    assert "threads 2, as when the run was begun" in capsys.readouterr().err


def test_what_the_user_sets_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: list[int]) -> None:
    monkeypatch.setattr(threads, "time_threads", lambda run, cores: pytest.fail("it is timed"))
    agent(tmp_path / "x", *RUN, "threads=3").train()
    assert (chosen, kept(tmp_path / "x")) == ([3], 3)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    agent(tmp_path / "y", *RUN).train()
    assert (chosen, kept(tmp_path / "y")) == ([3], None)


def test_a_number_that_is_much_slower_is_timed_once(monkeypatch: pytest.MonkeyPatch, chosen: list[int]) -> None:
    clock = [0.0]
    monkeypatch.setattr(threads.time, "perf_counter", lambda: clock[0])

    def train() -> None:
        clock[0] += 0.3 if chosen[-1] == 1 else 3.0

    assert threads.in_turns(train, [1, 2, 4]) == pytest.approx({1: 0.3, 2: 3.0, 4: 3.0})
    assert [chosen.count(number) for number in (1, 2, 4)] == [5, 1, 1]


def test_short_runs_are_not_timed_and_none_changes_the_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: list[int]
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(threads, "in_turns", lambda *_: pytest.fail("it is timed"))
    agent(tmp_path / "x", *RUN).train()
    assert (chosen[-1], kept(tmp_path / "x")) == (4, None)


def test_ranks_and_gpus_keep_their_number(chosen: list[int], tmp_path: Path) -> None:
    for device, is_single in (("cuda", True), ("cpu", False)):
        session = SimpleNamespace(device=SimpleNamespace(type=device), is_single=is_single)
        run: Any = SimpleNamespace(folder=tmp_path, session=session, facts={})
        assert threads.settle_threads("auto", run) == ""
    assert chosen == []
