"""The run folder: its lock, the check that a run may be resumed, and the status of the run."""

from __future__ import annotations

import fcntl
import json
import secrets
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from jepa.config import ConfigError, changed_keys
from jepa.errors import FileError, RunError
from jepa.parallel.session import Session
from jepa.runs import checkpoint
from jepa.runs.metrics import read_config, read_ending, write_atomically


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
        if (error := sys.exc_info()[1]) is not None:
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
def open_folder(path: Path, *, config: dict, resume: bool, session: Session) -> Iterator[RunFolder]:
    """Lock the run folder, as rank 0 for all ranks, while the block runs.

    Raises ConfigError if the folder holds a run of another configuration, is used by a running process, or exists
    although resume=false; RunError if it cannot be written. Ranks above 0 raise PeerError.
    """
    with ExitStack() as stack:
        facts = session.broadcast_from_rank_zero(lambda: _claim(path, config, resume, stack))
        yield RunFolder(path, facts, writes=session.is_rank_zero)


def _claim(path: Path, config: dict, resume: bool, stack: ExitStack) -> dict:
    """Lock the folder until `stack` is closed, check its last checkpoint, and return run.json, new if there is none."""
    if (path / "config.yaml").exists() and not resume:
        raise ConfigError([f"resume=false: {path} exists already; give another name= or remove it"])
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = stack.enter_context((path / ".lock").open("w"))
    except OSError as error:
        raise RunError(
            f"{path} cannot be written ({error.strerror}): give another name= or start in another folder"
        ) from error
    try:
        fcntl.flock(lock.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError([f"{path} is in use by another training process; give another name="]) from error
    if (last := checkpoint.latest(path)) is not None:
        checkpoint.read_state(last)
        if changed := changed_keys(read_config(last), config):
            keys = "; ".join(changed)
            raise ConfigError([f"{path} holds a run of another configuration ({keys}): give another name="])
    try:
        return {"run_id": secrets.token_hex(4), "status": "running", "message": ""} | read_ending(path)
    except FileError as error:
        raise ConfigError([f"{error}: remove the folder or give name="]) from error
