"""The runs of a comparison, one process after another, under the same budget."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from statistics import harmonic_mean
from types import FrameType
from typing import Any

from jepa.comparison.members import OUTPUT, begun_line, member_line
from jepa.comparison.plan import PlannedRun
from jepa.comparison.results import BUDGET_FILE, MEASUREMENT_FOLDER, read_budget
from jepa.config import override_literal
from jepa.parallel.signals import AGAIN, no_interrupts, say
from jepa.reports.verdict import series
from jepa.runs.metrics import read_rows, write_atomically

WARM_UP, MEASURED = 4, 12
"""Steps of the measurement: the first ones do not count in the rate."""
TAIL_LINES = 15
"""Number of lines of a failed run that are printed again."""


class TrainProcesses:
    """Runs jepa-train in processes, one at a time, and forwards signals to them."""

    def __init__(self, flags: Sequence[str] = ()) -> None:
        self.flags = tuple(flags)
        self.signum = 0
        self._process: subprocess.Popen | None = None

    def receive(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and not self.signum:
            say(f"stopping after this step; {AGAIN}")
        self.signum = signum
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signum)

    def train(self, overrides: Sequence[str], output: Path | None = None) -> tuple[int, list[str]]:
        """Train with these overrides, the output at the end of a file; returns the exit status and the last lines."""
        command = [sys.executable, "-m", "jepa.cli.train", *self.flags, *overrides]
        tail: deque[str] = deque(maxlen=TAIL_LINES)
        # a process group of its own, or Ctrl-C would reach it twice: the second signal stops it without saving
        with no_interrupts():
            self._process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", process_group=0
            )
        with self._process, (output or Path(os.devnull)).open("a", encoding="utf-8", errors="replace") as file:
            if self.signum:
                self._process.send_signal(self.signum)
            assert self._process.stdout is not None
            for line in map(str.rstrip, self._process.stdout):
                tail.append(line)
                print(line, file=file, flush=True)
        return self._process.returncode, list(tail)


def run_all(
    folder: Path, members: Sequence[PlannedRun], seconds: float | None, processes: TrainProcesses
) -> dict[str, str]:
    """Train the unfinished runs until a signal arrives; returns the folders of failed runs with the reasons."""
    budget = {"seconds": seconds, "steps": {}, "samples_per_s": {}, "members": {}} | read_budget(folder)
    budget["members"] |= {member.label: member.method * bool(member.name) for member in members}
    failed = {}
    print(f"{len(members)} runs in {folder}; all output of a run is in its {OUTPUT}", flush=True)
    for member in members:
        if processes.signum:
            break
        judge = member.config["evaluation"]["judge"]
        if member.is_finished:
            print(member_line(member.folder, "finished", None, judge), flush=True)
            continue
        if member.dropped:
            print(f"{member.label}: its objective does not use {', '.join(member.dropped)}: left out", flush=True)
        print(begun_line(member.folder), end="", flush=True)
        begun = time.monotonic()
        status, tail = _run(folder, member, budget, processes)
        state = "finished" if status == 0 else "stopped" if processes.signum else "failed"
        print(member_line(member.folder, state, time.monotonic() - begun, judge), flush=True)
        if state == "failed":
            failed[str(member.folder)] = f"exit status {status}"
            lines = "".join(f"\n  | {line}" for line in tail)
            print(f"{member.label} failed with exit status {status}; its last lines:{lines}", flush=True)
    return failed


def _run(folder: Path, member: PlannedRun, budget: dict[str, Any], processes: TrainProcesses) -> tuple[int, list[str]]:
    overrides = list(member.overrides)
    if budget["seconds"] is not None:
        if member.method not in budget["steps"]:
            status, tail = _measure(folder, member, budget, processes)
            if status:
                return status, tail
        overrides = [text for text in overrides if not text.startswith("steps=")]
        overrides.append(f"steps={budget['steps'][member.method]}")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / BUDGET_FILE, json.dumps(budget, indent=1))
    member.folder.mkdir(parents=True, exist_ok=True)
    return processes.train(overrides, member.folder / OUTPUT)


def _measure(
    folder: Path, member: PlannedRun, budget: dict[str, Any], processes: TrainProcesses
) -> tuple[int, list[str]]:
    """Train a few steps and delete that run; sets the steps of the method that fill the budget."""
    run = folder / MEASUREMENT_FOLDER
    size = member.config["batch_size"]
    shutil.rmtree(run, ignore_errors=True)
    overrides = [
        f"steps={WARM_UP + MEASURED}", f"log_every={WARM_UP}", "evaluator=[]", "logger=none", "phases=[]",
        "evaluation.train_samples=2", "evaluation.val_samples=2", "evaluation.still=false",
        f"name={override_literal(run.relative_to('outputs'))}",
    ]  # fmt: skip
    keys = {text.partition("=")[0] for text in [*overrides, "epochs="]}
    others = [text for text in member.overrides if text.lstrip("+").partition("=")[0] not in keys]
    status, tail = processes.train([*others, *overrides])
    rates = [rate for step, rate in series(read_rows(run), "perf/samples_per_s") if step > WARM_UP]
    shutil.rmtree(run, ignore_errors=True)
    if status or not rates:
        return status or 1, tail
    rate = harmonic_mean(rates)
    steps = max(1, round(budget["seconds"] * rate / size))
    budget["steps"][member.method], budget["samples_per_s"][member.method] = steps, rate
    fill = f"{steps:,} steps of {size} fill {budget['seconds']:g} s"
    print(f"{member.method}: {rate:.1f} samples/s, so {fill}", flush=True)
    return 0, []
