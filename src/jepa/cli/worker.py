"""python -m jepa.cli.worker CONFIG FOLDER: one of the processes that `jepa-train` starts, one per GPU."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path

import yaml

from jepa.cli.terminal import interruptible, quick_imports, report_error, setup_logging
from jepa.config import ConfigError, to_dataclass
from jepa.errors import RunError, as_run_errors
from jepa.parallel.signals import FROM_SCHEDULERS, Interrupt, listen

SAVE_SECONDS = 300
"""Time that a rank has to save a checkpoint after its parent process has died."""


def main() -> int:
    """Train the configuration; returns the exit status."""
    threading.Thread(target=_follow_parent, daemon=True).start()
    config_file, folder = map(Path, sys.argv[1:])
    setup_logging()
    with listen(signals=FROM_SCHEDULERS) as interrupt:
        return interruptible(partial(_train, config_file, folder, interrupt))


def _train(config_file: Path, folder: Path, interrupt: Interrupt) -> int:
    try:
        with quick_imports():
            from jepa.agent import train

        with as_run_errors():
            return train(to_dataclass(yaml.safe_load(config_file.read_text(encoding="utf-8"))), folder, interrupt)
    except (ConfigError, RunError) as error:
        return report_error(error)


def _follow_parent() -> None:
    """Wait until the parent process closes standard input; then save and stop, or exit after `SAVE_SECONDS`."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(SAVE_SECONDS)
    os._exit(1)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status) if status else sys.exit(0)  # a broken process group may block the normal exit
