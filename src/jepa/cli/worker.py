"""python -m jepa.cli.worker CONFIG FOLDER: one of the processes that `jepa-train` starts on a machine."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import yaml

from jepa.cli.terminal import quick_imports, report_error, setup_logging
from jepa.config import ConfigError, to_dataclass
from jepa.errors import RunError
from jepa.parallel.signals import FROM_SCHEDULERS, listen

PATIENCE_SECONDS = 300
"""that a rank may take to save after the process that started it is gone"""


def main() -> int:
    """The exit status."""
    threading.Thread(target=_follow_parent, daemon=True).start()
    written, folder = map(Path, sys.argv[1:])
    setup_logging()
    with listen(signals=FROM_SCHEDULERS) as interrupt:
        try:
            with quick_imports():
                from jepa.agent import train

            return train(to_dataclass(yaml.safe_load(written.read_text())), folder, interrupt)
        except (ConfigError, RunError) as error:
            return report_error(error)


def _follow_parent() -> None:
    """Standard input ends with the process that holds its other end: save and stop, or else just stop."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(PATIENCE_SECONDS)
    os._exit(1)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status) if status else sys.exit(0)  # a lost process group may keep the interpreter from its end
