"""Signal handlers that are installed while a block runs."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
STOPS, FROM_SCHEDULERS = SIGNALS[:2], SIGNALS[1:]


@contextmanager
def handlers(signals: Collection[int], handler: Callable[..., Any] | signal.Handlers) -> Iterator[None]:
    """Install the handler while the block runs, then restore the previous ones.

    Python allows it in the main thread only; in another, signals are left to whoever has started it.
    """
    signals = signals if threading.current_thread() is threading.main_thread() else ()
    previous = {signum: signal.signal(signum, handler) for signum in signals}
    try:
        yield
    finally:
        for item in previous.items():
            signal.signal(*item)


@dataclass
class Interrupt:
    """A request to stop; 0 stands for no signal."""

    signum: int = 0
    """Signal that this process has received."""
    signum_on_all_ranks: int = 0
    """Signal that all ranks stop for."""

    def is_requested(self) -> bool:
        return self.signum != 0

    def receive(self, signum: int, frame: FrameType | None) -> None:
        if self.signum and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = signum


@contextmanager
def listen(interrupt: Interrupt | None = None, signals: Collection[int] = SIGNALS) -> Iterator[Interrupt]:
    """Record signals while the block runs, in `interrupt` if given.

    While a run is prepared only those `FROM_SCHEDULERS` are recorded: they would end the process before it can put its
    job back into the queue. Ctrl-C ends it.
    """
    interrupt = interrupt or Interrupt()
    with handlers(signals, interrupt.receive):
        yield interrupt
