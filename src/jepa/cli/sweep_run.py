"""Carries out a sweep with whatever launcher: signals reach its members, and in the end it says what came of each."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import active_children, resource_tracker
from pathlib import Path
from threading import Thread
from types import FrameType

from jepa.cli.terminal import program, rank
from jepa.errors import RunError
from jepa.parallel.signals import STOPS, handlers
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


def carry_out(sweep: Sweep, start: Callable[[], None]) -> int:
    """Start Hydra and tell the end; 0, 1 where a member is not finished, 128 plus the signal that stopped the sweep."""
    if "Slurm" in sweep.launcher and rank() == 0:
        print(f"what the jobs print: {sweep.places[0] / '.submitit'}/JOB/", file=sys.stderr)
    received: list[int] = []
    status = 0
    with to_workers(received) if "joblib" in sweep.launcher else to_jobs(sweep.places):
        try:
            start()
        except SystemExit as left:
            status = left.code if isinstance(left.code, int) else 1
    status = 128 + received[0] if received else status
    if status > 128:
        print(f"{program()}: stopped; the same command again goes on from there", file=sys.stderr)
        return status
    return max(status, _tell(sweep)) if rank() == 0 else status


@contextmanager
def to_workers(received: list[int]) -> Iterator[None]:
    """Workers of joblib start with the signals held back, lest one dies before it can save; `received` gets them."""
    from joblib.externals.loky.backend import resource_tracker as trackers_of_joblib

    for tracker in (resource_tracker, trackers_of_joblib):
        tracker.ensure_running()  # started later it would let the signals through
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)

    def hand_on(signum: int, frame: FrameType | None = None) -> None:
        received.append(signum)
        for worker in active_children():
            with suppress(ProcessLookupError):
                os.kill(worker.pid or 0, signal.SIGTERM)  # of a terminal they have SIGINT already

    def wait() -> None:
        while True:
            hand_on(signal.sigwait(STOPS))

    with handlers(STOPS, hand_on):
        Thread(target=wait, daemon=True).start()
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)


@contextmanager
def to_jobs(folders: Collection[Path]) -> Iterator[None]:
    """The member that trains in this process saves by itself; the jobs of a cluster are cancelled, and save too."""
    before = _jobs(folders)

    def leave(signum: int, frame: FrameType | None) -> None:
        if jobs := sorted(_jobs(folders) - before):
            print(f"{program()}: cancelling the jobs {' '.join(jobs)}", file=sys.stderr)
            subprocess.run(["scancel", *jobs], check=False, timeout=60)
        sys.exit(128 + signum)

    with handlers(STOPS, leave):
        yield


def _jobs(folders: Collection[Path]) -> set[str]:
    """Numbers of all jobs and arrays of jobs that were ever submitted from these folders."""
    return {path.name.split("_")[0] for folder in folders for path in folder.glob(".submitit/[0-9]*")}


def _tell(sweep: Sweep) -> int:
    """The table of the finished members, and what has come of the others, in the order of the grid."""
    from jepa.comparison.report import terminal
    from jepa.comparison.results import compare, find_runs

    failed = [(member, how) for member in sweep.members or _found(sweep) if (how := _failure(member))]
    with suppress(RunError):  # where no run is finished
        table = terminal(compare(find_runs(sweep.places)))
        print(f"\n{table}\nas a page: jepa-compare {' '.join(map(str, sweep.places))}", flush=True)
    for member, how in failed:
        print(f"{program()}: {member} {how}", file=sys.stderr)
    if failed:
        print(f"{program()}: the same command again goes on with what is not finished", file=sys.stderr)
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
