"""The run folder: its lock, the check that a run may be resumed, and the status of the run."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from jepa.config import ConfigError, changed_keys
from jepa.errors import FileError, RunError
from jepa.parallel.session import Session
from jepa.runs import checkpoint
from jepa.runs.metrics import read_config, read_ending, write_atomically

log = logging.getLogger(__name__)
FULL_OR_READ_ONLY = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG}
"""Numbers of the errors of a disk that takes no more files."""
PATIENCE = 10
"""Seconds in which the workers of a killed process must have ended."""
LENGTH = {"steps", "epochs"}
"""Keys that say how long a run is, which may change when it is resumed."""


@dataclass
class RunFolder:
    """outputs/NAME with run.json: run_id, status (running, finished, stopped or failed) and message (why it ended).

    All ranks hold the same `facts`; only rank 0 `writes` them.
    """

    path: Path
    facts: dict[str, str]
    writes: bool

    @property
    def status(self) -> str:
        return self.facts["status"]

    def begin(self, config_text: str) -> None:
        if self.writes:
            write_atomically(self.path / "config.yaml", config_text)
        self._write(status="running", message="")

    def end(self, signum: int) -> None:
        """Record how the run ended: by the exception being handled, by the signal `signum`, or finished if it is 0."""
        error = sys.exc_info()[1]
        if isinstance(error, KeyboardInterrupt):
            self._write(status="stopped", message="stopped by Ctrl-C, before the state was saved")
        elif error is not None:
            with suppress(OSError):  # the error being handled says what is wrong
                self._write(status="failed", message=f"{type(error).__name__}: {error}")
        elif signum:
            self._write(status="stopped", message=f"stopped by {signal.Signals(signum).name}")
        else:
            self._write(status="finished", message="")

    def _write(self, **facts: str) -> None:
        self.facts |= facts
        if self.writes:
            write_atomically(self.path / "run.json", json.dumps(self.facts, indent=1))


@contextmanager
def open_folder(path: Path, *, config: dict, resume: bool | str, session: Session) -> Iterator[RunFolder]:
    """Lock the run folder, as rank 0 for all ranks, while the block runs.

    Raises ConfigError if the folder holds a run of another configuration, is used by a running process, or exists
    although resume=false; RunError if it cannot be written, also by the block. Ranks above 0 raise PeerError.
    """
    with ExitStack() as stack:
        facts = session.broadcast_from_rank_zero(lambda: _claim(path, config, resume, stack))
        try:
            yield RunFolder(path, facts, writes=session.is_rank_zero)
        except OSError as error:
            if error.errno not in FULL_OR_READ_ONLY:
                raise
            where = error.filename or path
            raise RunError(
                f"{where} cannot be written ({error.strerror}): make room there, then run the same command again, "
                "which resumes from the last checkpoint"
            ) from error


def _claim(path: Path, config: dict, resume: bool | str, stack: ExitStack) -> dict:
    """Lock the folder until `stack` is closed, check its last checkpoint, and return run.json, new if there is none."""
    if (path / "config.yaml").exists() and not resume:
        raise ConfigError([f"resume=false: {path} exists already; give another name= or remove it"])
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = stack.enter_context((path / ".lock").open("a+"))
    except OSError as error:
        raise RunError(
            f"{path} cannot be written ({error.strerror}): give another name= or start in another folder"
        ) from error
    _lock(lock, path)
    newest = checkpoint.latest(path)
    last = checkpoint.latest_whole(path) if resume == "previous" else newest
    try:
        facts = {"run_id": secrets.token_hex(4), "status": "running", "message": ""} | read_ending(path)
    except FileError as error:
        raise ConfigError([f"{error}: remove that file, and the run goes on from its last checkpoint"]) from error
    if last is None:
        return facts
    if last != newest and facts["status"] == "finished":
        facts["status"] = "stopped"  # the steps after the older checkpoint are trained again
    checkpoint.read_state(last)
    earlier = read_config(last)
    if changed := changed_keys(earlier, config, ignore=LENGTH):
        raise ConfigError([f"{path} holds a run of another configuration ({'; '.join(changed)}): give another name="])
    if checkpoint.named(last.parent, "last") != last:
        log.warning("%s/checkpoints/last is not there; the run resumes from the newest checkpoint, %s", path, last.name)
    if facts["status"] == "finished" and changed_length(earlier, config):
        facts["status"] = "stopped"
    return facts


def _lock(file: IO[str], path: Path) -> None:
    """Lock an open file and leave the owner's process number there; one warning where the file system has no locks.

    Worker processes of one that was killed keep its lock until they notice; that is waited for.
    """
    try:
        end = time.monotonic() + PATIENCE
        while not _try_to_lock(file):
            if not _owner_is_gone(file) or time.monotonic() > end:
                raise ConfigError([f"{path} is in use by another training process; give another name="])
            time.sleep(0.1)
        with suppress(OSError):  # a full disk is told where something is lost
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), f"{socket.gethostname()} {os.getpid()}".encode())
    except OSError as error:
        if error.errno not in checkpoint.UNSUPPORTED:
            raise RunError(f"{path} cannot be locked ({error.strerror}): give another name=") from error
        log.warning("%s has no locks (%s): start no second training in this folder", path, error.strerror)


def _try_to_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _owner_is_gone(file: IO[str]) -> bool:
    """True if the process that took the lock was one of this machine and does not exist any more."""
    file.seek(0)
    host, _, number = file.read(200).rpartition(" ")
    if host != socket.gethostname() or not number.isdigit():
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def changed_length(earlier: Mapping, config: Mapping) -> str:
    """What differs in the length of a run, as text; empty if nothing does. `steps` wins over `epochs`."""
    if earlier.get("steps") == config.get("steps") is not None:
        return ""
    return "; ".join(text for text in changed_keys(earlier, config) if text.partition(":")[0] in LENGTH)
