"""Runs a sweep with any launcher and reports the outcome of each member."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from jepa.cli.sweep_signals import forward_to_slurm, forward_to_workers
from jepa.cli.terminal import STOPPED, program_name, rank
from jepa.comparison.members import OUTPUT
from jepa.errors import RunError
from jepa.runs.metrics import read_ending

FAILURE = "failure.txt"
"""File in the folder of a member with the error of its last attempt."""


@dataclass(frozen=True)
class Sweep:
    """Several runs that are started by one command."""

    folders: Sequence[Path]
    """Parent folders of the runs: one, unless the runs differ in `name`."""
    members: Sequence[Path]
    """Run folders in the order of the grid; empty if a sampler chooses them."""
    launcher: str
    """Dotted name of the class of Hydra's launcher."""


def run_sweep(sweep: Sweep, start: Callable[[], None]) -> int:
    """Start Hydra and report the outcome; 0, 1 if a member is not finished, 128 plus the signal that stopped it."""
    if "Slurm" in sweep.launcher and rank() == 0:
        print(f"output of the jobs: {sweep.folders[0] / '.submitit'}/JOB/", file=sys.stderr)
    elif rank() == 0:
        count = f"{len(sweep.members)} runs" if sweep.members else "runs"
        print(f"{count} in {', '.join(map(str, sweep.folders))}; all output of a run is in its {OUTPUT}", flush=True)
    received: list[int] = []
    status = 0
    with forward_to_workers(received) if "joblib" in sweep.launcher else forward_to_slurm(sweep.folders):
        try:
            start()
        except SystemExit as exit:
            status = exit.code if isinstance(exit.code, int) else 1
        except OSError as error:  # of Hydra, which writes multirun.yaml
            error.filename = error.filename or sweep.folders[0]
            raise
    status = 128 + received[0] if received else status
    if status > 128:
        print(f"{program_name()}: {STOPPED}", file=sys.stderr)
        return status
    return max(status, _report(sweep)) if rank() == 0 else status


def _report(sweep: Sweep) -> int:
    """Print the table of finished members, then the others in the order of the grid; returns 1 if there are others."""
    from jepa.comparison.report import terminal
    from jepa.comparison.results import compare, find_runs

    members = sweep.members or sorted(
        {path.parent for name in ("run.json", FAILURE) for folder in sweep.folders for path in folder.rglob(name)}
    )
    unfinished = [(member, state) for member in members if (state := _why_unfinished(member))]
    with suppress(RunError):  # no run is finished
        table = terminal(compare(find_runs(sweep.folders)))
        print(f"\n{table}\nas a page: jepa-compare {' '.join(map(str, sweep.folders))}", flush=True)
    for member, state in unfinished:
        print(f"{program_name()}: {member} {state}", file=sys.stderr)
    if unfinished:
        print(f"{program_name()}: run the same command again to continue the unfinished runs", file=sys.stderr)
    return 1 if unfinished else 0


def _why_unfinished(member: Path) -> str:
    """Why a member is not finished; empty if it is."""
    facts = read_ending(member)
    if (member / FAILURE).exists():
        return f"failed: {(member / FAILURE).read_text(encoding='utf-8')}"
    if facts.get("status") == "finished":
        return ""
    return f"is not finished: {facts.get('message') or facts.get('status', 'it has not started')}"
