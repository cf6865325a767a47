"""A sweep is stopped as a whole: signals reach its members, wherever they train, and nothing of them is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import active_children, resource_tracker
from pathlib import Path
from threading import Thread
from types import FrameType

from jepa.cli.terminal import program_name
from jepa.parallel.signals import STOPS, handlers


@contextmanager
def forward_to_workers(received: list[int]) -> Iterator[None]:
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
def unblocked(held: set[int]) -> Iterator[None]:
    """What is held back from a worker reaches it while it has something to save; before that it leaves."""
    with handlers(held, lambda signum, _: sys.exit(128 + signum)):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, held)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_BLOCK, held)


@contextmanager
def forward_to_slurm(folders: Collection[Path]) -> Iterator[None]:
    """The member that trains in this process saves by itself; the jobs of a cluster are cancelled, and save too."""
    before = _jobs(folders)

    def leave(signum: int, frame: FrameType | None) -> None:
        if jobs := sorted(_jobs(folders) - before):
            print(f"{program_name()}: cancelling the jobs {' '.join(jobs)}", file=sys.stderr)
            subprocess.run(["scancel", *jobs], check=False, timeout=60)
        sys.exit(128 + signum)

    with handlers(STOPS, leave):
        yield


def _jobs(folders: Collection[Path]) -> set[str]:
    """Numbers of all jobs and arrays of jobs that were ever submitted from these folders."""
    return {path.name.split("_")[0] for folder in folders for path in folder.glob(".submitit/[0-9]*")}
