"""The run folder: whose it is, whether it may be continued, and how the run in it ended."""

from __future__ import annotations

import fcntl
import json
import secrets
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jepa import checkpoint
from jepa.config import ConfigError, changed_keys
from jepa.folder_log import write_atomically


class RunFolder:
    """outputs/NAME with run.json: id, status (running, finished, stopped or failed) and the reason of the last end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.facts = self._read()

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
        write_atomically(self.path / "run.json", json.dumps(self.facts, indent=1))

    def _read(self) -> dict:
        try:
            return json.loads((self.path / "run.json").read_text())
        except FileNotFoundError:
            return {"run_id": secrets.token_hex(4), "status": "running", "message": ""}
        except json.JSONDecodeError as error:
            raise ConfigError(
                [f"{self.path}/run.json cannot be read ({error}): remove the folder or give name="]
            ) from error


@contextmanager
def open_folder(path: Path, *, config: dict, resume: bool) -> Iterator[RunFolder]:
    """Claim the folder for this process.

    Raises ConfigError when the folder belongs to a run of another configuration, to a running process, or exists
    although resume=false.
    """
    if (path / "config.yaml").exists() and not resume:
        raise ConfigError([f"resume=false: {path} exists already; give another name= or remove it"])
    path.mkdir(parents=True, exist_ok=True)
    with (path / ".lock").open("w") as lock:
        _claim(lock.fileno(), path)
        _compare(path, config)
        yield RunFolder(path)


def _claim(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError([f"{path} is in use by another process that trains there; give another name="]) from error


def _compare(path: Path, config: dict) -> None:
    last = checkpoint.latest(path)
    if last is None:
        return
    changed = changed_keys(checkpoint.read_config(last), config)
    if changed:
        raise ConfigError([f"{path} holds a run of another configuration ({'; '.join(changed)}): give another name="])
