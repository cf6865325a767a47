"""The runs of a comparison, one process after another, under the same budget."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from jepa.comparison.plan import Member
from jepa.comparison.results import BUDGET_FILE, MEASUREMENT_FOLDER
from jepa.config import override_literal
from jepa.reports.verdict import series
from jepa.runs.metrics import read_json, read_rows, write_atomically

WARM_UP, MEASURED = 4, 12
"""steps of the measurement; the first ones are left out of the rate"""

TAIL_LINES = 15
"""lines of a failed run that are shown again"""


def _with_steps(member: Member, steps: int) -> Member:
    overrides = [text for text in member.overrides if not text.startswith("steps=")]
    return replace(member, overrides=(*overrides, f"steps={steps}"), config=member.config | {"steps": steps})


class TrainProcesses:
    """Runs of jepa-train in processes of their own, to which a signal is handed on."""

    def __init__(self, flags: Sequence[str] = ()) -> None:
        self.flags = tuple(flags)
        self.signum = 0
        self._child: subprocess.Popen | None = None

    def print_line(self, text: str) -> None:
        print(text, flush=True)

    def receive(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(signum)

    def train(self, overrides: Sequence[str], *, quiet: bool = False) -> tuple[int, list[str]]:
        """Exit status and last lines; what it prints is said line by line."""
        command = [sys.executable, "-m", "jepa.cli.train", *self.flags, *overrides]
        tail: deque[str] = deque(maxlen=TAIL_LINES)
        # a group of its own, or Ctrl-C would reach it twice: a second one stops it without saving
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", process_group=0
        ) as self._child:
            if self.signum:
                self._child.send_signal(self.signum)
            assert self._child.stdout is not None
            for line in map(str.rstrip, self._child.stdout):
                tail.append(line)
                if not quiet:
                    self.print_line(line)
        return self._child.returncode, list(tail)


def run_all(folder: Path, found: Sequence[Member], seconds: float | None, processes: TrainProcesses) -> dict[str, str]:
    """Train what is not finished; the labels of runs that failed, each with its reason. A signal ends it early."""
    budget = {"seconds": seconds, "steps": {}, "samples_per_s": {}, "members": {}} | read_json(folder / BUDGET_FILE)
    budget["members"] |= {member.label: member.method * bool(member.name) for member in found}
    failed = {}
    for number, member in enumerate(found, start=1):
        if processes.signum:
            break
        processes.print_line(f"== {number}/{len(found)} {member.label}{' is finished' * member.is_finished} ==")
        if member.dropped and not member.is_finished:
            processes.print_line(f"its objective has no use for {', '.join(member.dropped)}: left out")
        if member.is_finished:
            continue
        status, tail = _run(folder, member, budget, processes)
        if status and not processes.signum:
            failed[str(member.folder)] = f"exit status {status}"
            told = "".join(f"\n  | {line}" for line in tail)
            processes.print_line(f"{member.label} failed with exit status {status}; its last lines:{told}")
    return failed


def _run(folder: Path, member: Member, budget: dict[str, Any], processes: TrainProcesses) -> tuple[int, list[str]]:
    if budget["seconds"] is not None and member.method not in budget["steps"]:
        status, tail = _measure(folder, member, budget, processes)
        if status:
            return status, tail
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / BUDGET_FILE, json.dumps(budget, indent=1))
    if budget["seconds"] is not None:
        member = _with_steps(member, budget["steps"][member.method])
    return processes.train(member.overrides)


def _measure(folder: Path, member: Member, budget: dict[str, Any], processes: TrainProcesses) -> tuple[int, list[str]]:
    """Some steps of a run that is thrown away: how many of them, loader and optimizer included, fill the budget."""
    place = folder / MEASUREMENT_FOLDER
    size = member.config["batch_size"]
    shutil.rmtree(place, ignore_errors=True)
    quick = [f"steps={WARM_UP + MEASURED}", f"log_every={WARM_UP}", "evaluator=[]", "logger=none", "phases=[]"]
    small = ["evaluation.train_samples=2", "evaluation.val_samples=2", "evaluation.still=false"]
    wanted = {text.partition("=")[0] for text in [*quick, *small, "epochs=", "name="]}
    kept = [text for text in member.overrides if text.lstrip("+").partition("=")[0] not in wanted]
    name = override_literal(place.relative_to("outputs"))
    status, tail = processes.train([*kept, *quick, *small, f"name={name}"], quiet=True)
    rates = [rate for step, rate in series(read_rows(place), "perf/samples_per_s") if step > WARM_UP]
    shutil.rmtree(place, ignore_errors=True)
    if status or not rates:
        return status or 1, tail
    rate = len(rates) / sum(1 / rate for rate in rates)
    steps = max(1, round(budget["seconds"] * rate / size))
    budget["steps"][member.method], budget["samples_per_s"][member.method] = steps, rate
    processes.print_line(
        f"{member.method}: {rate:.1f} samples/s here, so {steps:,} steps of {size} fill {budget['seconds']:g} s"
    )
    return 0, []
