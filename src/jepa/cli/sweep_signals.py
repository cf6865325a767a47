"""Stops a sweep as a whole: forwards signals to its members, wherever they train, so that they save a checkpoint."""

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
from jepa.parallel.signals import AGAIN, STOPS, handlers, say


@contextmanager
def forward_to_workers(received: list[int]) -> Iterator[None]:
    """Forward SIGINT and SIGTERM to joblib workers, and append them to `received`.

    The workers start with both blocked, so that none is killed before it can save.
    """
    from joblib.externals.loky.backend import resource_tracker as joblib_resource_tracker

    for tracker in (resource_tracker, joblib_resource_tracker):
        tracker.ensure_running()  # started later, it would unblock the signals
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)

    def forward(signum: int, frame: FrameType | None = None) -> None:
        is_second = signum == signal.SIGINT and signum in received
        received.append(signum)
        for worker in active_children():
            with suppress(ProcessLookupError):  # from a terminal they have received SIGINT already
                os.kill(worker.pid or 0, signal.SIGKILL if is_second else signal.SIGTERM)
        if is_second:
            os._exit(128 + signum)
        if signum == signal.SIGINT:
            say(f"stopping all runs after their step; {AGAIN}")

    def wait() -> None:
        while True:
            forward(signal.sigwait(STOPS))

    with handlers(STOPS, forward):
        Thread(target=wait, daemon=True).start()
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)


@contextmanager
def unblocked(signals: set[int]) -> Iterator[None]:
    """Unblock signals that `forward_to_workers` has blocked; until the training listens, they exit the process."""
    with handlers(signals, lambda signum, _: sys.exit(128 + signum)):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_BLOCK, signals)


@contextmanager
def forward_to_slurm(folders: Collection[Path]) -> Iterator[None]:
    """Cancel the jobs of this sweep on SIGINT or SIGTERM; they save a checkpoint, as does a member in this process."""
    before = _jobs(folders)

    def cancel(signum: int, frame: FrameType | None) -> None:
        for stop in STOPS:
            if signal.getsignal(stop) is cancel:
                signal.signal(stop, signal.SIG_DFL)  # a second one ends the process: raised, it would disturb the exit
        if jobs := sorted(_jobs(folders) - before):
            print(f"{program_name()}: cancelling Slurm jobs {' '.join(jobs)}", file=sys.stderr)
            subprocess.run(["scancel", *jobs], check=False, timeout=60)
        sys.exit(128 + signum)

    with handlers(STOPS, cancel):
        yield


def _jobs(folders: Collection[Path]) -> set[str]:
    """IDs of all jobs and job arrays that were ever submitted from these folders."""
    return {path.name.split("_")[0] for folder in folders for path in folder.glob(".submitit/[0-9]*")}
