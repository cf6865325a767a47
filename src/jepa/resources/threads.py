"""The number of threads of a run on a CPU: timed before its first step and kept with it.

Beside other work the threads of OpenMP wait for each other most of the time, and one is faster than two (docs/LOG.md).
Sums differ in their last bits with their number, so a resumed run takes the number that it began with.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping

import torch

from jepa.parallel.environment import num_cores
from jepa.reports.console import header_line
from jepa.resources.measured import passes
from jepa.runs import checkpoint
from jepa.training.run import Run

SHORT_SECONDS = 40
"""Duration of a training, with one thread, for which timing does not pay."""
LONG_STEP = 1.0
"""Seconds of a step with one thread from which timing takes too long, and threads wait for each other more rarely."""
ROUNDS, SECONDS = 5, 3.0
"""Times that each number is timed, in turns, and the seconds of all of them."""
DROPPED = 1.5
"""Times the best mean so far from which a number of threads is not timed again."""
TOLERANCE = 1.05
"""The smallest number counts as the fastest if it takes at most this many times as long."""


def settle_threads(wanted: int | str, run: Run) -> str:
    """Set the number of threads of this process and note it for the checkpoints; returns what to say of it."""
    last, cores = checkpoint.latest(run.folder), num_cores()
    kept = checkpoint.peek(last).get("threads") if last else None
    if isinstance(wanted, int):
        return _set(wanted, run, "")
    if run.session.device.type != "cpu" or not run.session.is_single or "OMP_NUM_THREADS" in os.environ:
        return ""
    if kept:
        return _set(min(kept, cores), run, "as when the run was begun")
    if last or cores == 1 or not (seconds := time_threads(run, cores)):
        return ""
    chosen = fastest(seconds)
    times = ", ".join(f"{1000 * seconds[number]:.1f} ms with {number}" for number in seconds)
    return _set(chosen, run, f"the fastest now: a step takes {times}")


def _set(number: int, run: Run, why: str) -> str:
    torch.set_num_threads(number)
    run.facts["threads"] = number
    return header_line("threads", f"{number}, {why}; threads=N fixes it") if why else ""


def fastest(seconds: Mapping[int, float]) -> int:
    """The smallest number of threads that is about as fast as the fastest."""
    return min(number for number, spent in seconds.items() if spent <= TOLERANCE * min(seconds.values()))


def time_threads(run: Run, cores: int) -> dict[int, float]:
    """Seconds of a step by number of threads; empty if the run is short or its steps are long."""
    plan, before = run.plan, torch.get_num_threads()
    num_passes = plan.batch_size // plan.micro_batch_size
    try:
        with passes(plan, run.components, plan.micro_batch_size) as (train, _):
            torch.set_num_threads(1)  # several may be the slow ones
            train()
            seconds = num_passes * _mean(train, 0)
            if seconds > LONG_STEP or seconds * (plan.end_step - plan.begin_step) < SHORT_SECONDS:
                return {}
            spent = in_turns(train, sorted({*(2**n for n in range(cores.bit_length())), cores}))
            return {number: num_passes * mean for number, mean in spent.items()}
    finally:
        torch.set_num_threads(before)


def in_turns(train: Callable[[], None], numbers: list[int]) -> dict[int, float]:
    """Mean seconds of a pass with each number of threads.

    They take turns, so that other work disturbs all alike; a number that is much slower has no further turn.
    """
    spent: dict[int, list[float]] = {number: [] for number in numbers}
    means: dict[int, float] = {}
    for _ in range(ROUNDS):
        left = [number for number in numbers if means.get(number, 0) <= DROPPED * min(means.values(), default=0)]
        for number in left:
            torch.set_num_threads(number)
            spent[number].append(_mean(train, SECONDS / ROUNDS / len(numbers)))
        means = {number: sum(values) / len(values) for number, values in spent.items()}
    return means


def _mean(train: Callable[[], None], seconds: float) -> float:
    """Mean duration of a pass, over at least this time: the shortest would hide that threads wait for each other."""
    begun, count = time.perf_counter(), 0
    while not count or time.perf_counter() - begun < seconds:
        train()
        count += 1
    return (time.perf_counter() - begun) / count
