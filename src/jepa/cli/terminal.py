"""Terminal output of the commands: errors, logging and exit status, by rank; and faster imports."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from jepa.config.machine import check_start
from jepa.errors import ConfigError, RunError, as_run_errors
from jepa.parallel.environment import process_info
from jepa.parallel.signals import handlers, interrupt_no_more, interrupt_once, leave
from jepa.reports.text import print_any_text

ERROR_DELAY_SECONDS = 3
"""Delay before a rank above 0 prints a configuration error, which rank 0 usually prints first."""
STOPPED = "stopped; run the same command again to continue"
STOPPED_AT_ONCE = "stopped at once; run the same command again to resume from the last checkpoint, if there is one"


def rank() -> int:
    """Rank of this process, as set by torchrun or Slurm; 0 without them."""
    with suppress(RunError):  # wrong variables are reported when the session is opened
        if process := process_info(os.environ):
            return process.rank
    return 0


def setup_logging() -> None:
    """Log messages of rank 0 and errors of the other ranks."""
    print_any_text()
    logging.basicConfig(level=logging.ERROR if rank() else logging.INFO, format="%(message)s", force=True)


def report_error(error: ConfigError | RunError, about: str = "") -> int:
    """Print the error, unless rank 0 prints it for all ranks; returns the exit status."""
    status = getattr(error, "status", 2 if isinstance(error, ConfigError) else 1)
    who = f"rank {rank()} on {socket.gethostname()}: " if rank() else ""
    if rank() and isinstance(error, ConfigError):
        time.sleep(ERROR_DELAY_SECONDS)
    if not rank() or not getattr(error, "on_all_ranks", False):
        print(f"{program_name()}: {who}{about}{getattr(error, 'brief', error)}", file=sys.stderr, flush=True)
    return status


def program_name() -> str:
    """Name of the command that the user has called."""
    return "jepa-finetune" if Path(sys.argv[0]).stem in ("finetune", "jepa-finetune") else "jepa-train"


def check_working_folder() -> None:
    """Raises RunError where the working folder was removed, which no later error would say."""
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise RunError("the working folder does not exist any more; go to another one") from error


def run_command(name: str, command: Callable[[], int], *, failed: int = 1, stopped: str = "stopped") -> int:
    """Exit status of a command; prints configuration errors (2), run errors (`failed`) and Ctrl-C (130)."""

    def checked() -> int:
        try:
            with as_run_errors():
                check_working_folder()
                return command()
        except (ConfigError, RunError) as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 2 if isinstance(error, ConfigError) else failed

    print_any_text()
    return interruptible(checked, f"{name}: {stopped}")


def interruptible(command: Callable[[], int], message: str = "") -> int:
    """Exit status of a command; 130 after Ctrl-C, of which a second one may arrive at any place."""
    try:
        try:
            interrupt_once()
            return command()
        except KeyboardInterrupt:
            print(message, file=sys.stderr, end="\n" if message else "")
            return 130
        finally:
            interrupt_no_more()
    except KeyboardInterrupt:
        return 130


@contextmanager
def quick_imports(config: Any = None) -> Iterator[None]:
    """Import torch without garbage collection, and exclude what was imported from later ones; Ctrl-C ends the process.

    The collector would scan a million objects and free none. Does nothing if torch is imported already. Raises
    ConfigError before, for what this machine lacks of `config`, see `check_start`.
    """
    check_start(config)
    if is_first := "torch" not in sys.modules:
        gc.disable()
    with handlers([signal.SIGINT] if is_first else [], leave):
        yield
    if is_first:
        gc.freeze()
        atexit.register(gc.unfreeze)  # some extension modules warn about objects that are never freed
        gc.enable()
