"""Carries out a sweep with whatever launcher, and says in the end what has come of each member."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from jepa.cli.sweep_signals import forward_to_slurm, forward_to_workers
from jepa.cli.terminal import program_name, rank
from jepa.errors import RunError
from jepa.runs.metrics import read_json

FAILURE = "failure.txt"
"""in the folder of a member, why its last start has failed"""


@dataclass(frozen=True)
class Sweep:
    """Several runs: their folders in the order of the grid, none where a sampler chooses them."""

    places: Sequence[Path]
    """the folders that hold them: one, unless they differ in their `name`"""
    members: Sequence[Path]
    launcher: str
    """the class"""


def run_sweep(sweep: Sweep, start: Callable[[], None]) -> int:
    """Start Hydra and tell the end; 0, 1 where a member is not finished, 128 plus the signal that stopped the sweep."""
    if "Slurm" in sweep.launcher and rank() == 0:
        print(f"what the jobs print: {sweep.places[0] / '.submitit'}/JOB/", file=sys.stderr)
    received: list[int] = []
    status = 0
    with forward_to_workers(received) if "joblib" in sweep.launcher else forward_to_slurm(sweep.places):
        try:
            start()
        except SystemExit as left:
            status = left.code if isinstance(left.code, int) else 1
    status = 128 + received[0] if received else status
    if status > 128:
        print(f"{program_name()}: stopped; the same command again goes on from there", file=sys.stderr)
        return status
    return max(status, _tell(sweep)) if rank() == 0 else status


def _tell(sweep: Sweep) -> int:
    """The table of the finished members, and what has come of the others, in the order of the grid."""
    from jepa.comparison.report import terminal
    from jepa.comparison.results import compare, find_runs

    failed = [(member, how) for member in sweep.members or _found(sweep) if (how := _failure(member))]
    with suppress(RunError):  # where no run is finished
        table = terminal(compare(find_runs(sweep.places)))
        print(f"\n{table}\nas a page: jepa-compare {' '.join(map(str, sweep.places))}", flush=True)
    for member, how in failed:
        print(f"{program_name()}: {member} {how}", file=sys.stderr)
    if failed:
        print(f"{program_name()}: the same command again goes on with what is not finished", file=sys.stderr)
    return min(1, len(failed))


def _found(sweep: Sweep) -> list[Path]:
    """Members that a sampler has chosen."""
    names = "run.json", FAILURE
    return sorted({path.parent for place in sweep.places for name in names for path in place.rglob(name)})


def _failure(member: Path) -> str:
    """What has become of a member, empty where it is finished."""
    facts = read_json(member / "run.json")
    if (member / FAILURE).exists():
        return f"failed: {(member / FAILURE).read_text()}"
    if facts.get("status") == "finished":
        return ""
    return f"is not finished: {facts.get('message') or facts.get('status', 'it has not begun')}"
