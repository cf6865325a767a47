"""The run folder: whose it is, whether it may be continued, and how the run in it ended."""

from __future__ import annotations

import fcntl
import json
import secrets
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from jepa.config import ConfigError, changed_keys
from jepa.errors import RunError
from jepa.parallel.session import Session
from jepa.runs import checkpoint
from jepa.runs.metrics import read_config, write_atomically


class RunFolder:
    """outputs/NAME with run.json: id, status (running, finished, stopped or failed) and the reason of the last end.

    One rank `writes`, the others know what it has read.
    """

    def __init__(self, path: Path, facts: dict, *, writes: bool = True) -> None:
        self.path, self.facts, self.writes = path, facts, writes

    @property
    def run_id(self) -> str:
        return self.facts["run_id"]

    @property
    def status(self) -> str:
        return self.facts["status"]

    @property
    def is_finished(self) -> bool:
        return self.status == "finished"

    def begin(self, config_text: str) -> None:
        if self.writes:
            write_atomically(self.path / "config.yaml", config_text)
        self._write(status="running", message="")

    def end(self, signum: int) -> None:
        """Record how the run ended, by the error in flight, if any, or by the signal that stopped it."""
        error = sys.exc_info()[1]
        if error is not None:
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
    """Claim the folder for this process, or for the ranks of which this is one.

    Raises ConfigError when the folder belongs to a run of another configuration, to a running process, or exists
    although resume=false; RunError when it cannot be written. Ranks other than 0 raise PeerError.
    """
    with ExitStack() as held:
        facts = session.broadcast_from_rank_zero(lambda: _claim(path, config, resume, held))
        yield RunFolder(path, facts, writes=session.is_rank_zero)


def _claim(path: Path, config: dict, resume: bool, held: ExitStack) -> dict:
    """What is known of the run in it; the folder is this process's as long as `held` is."""
    if (path / "config.yaml").exists() and not resume:
        raise ConfigError([f"resume=false: {path} exists already; give another name= or remove it"])
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = held.enter_context((path / ".lock").open("w"))
    except OSError as error:
        raise RunError(f"{path} cannot be written ({error.strerror}): give another name= or work elsewhere") from error
    try:
        fcntl.flock(lock.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError([f"{path} is in use by another process that trains there; give another name="]) from error
    _compare(path, config)
    return _read(path)


def _read(path: Path) -> dict:
    try:
        return json.loads((path / "run.json").read_text())
    except FileNotFoundError:
        return {"run_id": secrets.token_hex(4), "status": "running", "message": ""}
    except json.JSONDecodeError as error:
        raise ConfigError([f"{path}/run.json cannot be read ({error}): remove the folder or give name="]) from error


def _compare(path: Path, config: dict) -> None:
    """The one place where what a run goes on from is checked whole: by one rank, before anything is changed."""
    last = checkpoint.latest(path)
    if last is None:
        return
    checkpoint.read_state(last)
    changed = changed_keys(read_config(last), config)
    if changed:
        raise ConfigError([f"{path} holds a run of another configuration ({'; '.join(changed)}): give another name="])
