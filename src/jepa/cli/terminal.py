"""What a rank says on the terminal: rank 0 everything, the others what they alone know."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from jepa.errors import ConfigError, RunError
from jepa.parallel.environment import process_info

LATER_SECONDS = 3
"""after which a rank says what rank 0, which finds the same, should have said before it"""


def rank() -> int:
    """Of this process, as torchrun or Slurm tell it."""
    with suppress(RunError):  # which says itself what is wrong with them
        place = process_info(os.environ)
        return place.rank if place else 0
    return 0


def setup_logging() -> None:
    """Messages of rank 0, errors of the others."""
    logging.basicConfig(level=logging.ERROR if rank() else logging.INFO, format="%(message)s", force=True)


def report_error(error: ConfigError | RunError, about: str = "") -> int:
    """Print it, where no other rank does; the exit status."""
    status = getattr(error, "status", 2 if isinstance(error, ConfigError) else 1)
    who = f"rank {rank()} on {socket.gethostname()}: " if rank() else ""
    if rank() and isinstance(error, ConfigError):
        time.sleep(LATER_SECONDS)
    if not rank() or not getattr(error, "on_all_ranks", False):
        print(f"{program_name()}: {who}{about}{getattr(error, 'brief', error)}", file=sys.stderr, flush=True)
    return status


def program_name() -> str:
    """The name under which the user has called us."""
    return "jepa-finetune" if Path(sys.argv[0]).stem in ("finetune", "jepa-finetune") else "jepa-train"


def outcome(name: str, command: Callable[[], int], *, failed: int = 1, stopped: str = "stopped") -> int:
    """The exit status of a command, also where it is refused, fails or is left by Ctrl-C, which is said."""
    try:
        return command()
    except (ConfigError, RunError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else failed
    except KeyboardInterrupt:
        print(f"{name}: {stopped}", file=sys.stderr)
        return 130


@contextmanager
def quick_imports() -> Iterator[None]:
    """Without the garbage collector, which then leaves alone until the end of the process what has been imported.

    In a million objects it finds nothing, and takes a sixth of the time. Where torch is there already, nothing changes.
    """
    is_first = "torch" not in sys.modules
    if is_first:
        gc.disable()
    yield
    if is_first:
        gc.freeze()
        atexit.register(gc.unfreeze)  # extension modules complain of objects that are never freed
        gc.enable()
