"""Handlers of signals that stay for as long as a block runs."""

from __future__ import annotations

import signal
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
STOPS, FROM_SCHEDULERS = SIGNALS[:2], SIGNALS[1:]


@contextmanager
def handlers(signals: Collection[int], handler: Callable[..., Any] | signal.Handlers) -> Iterator[None]:
    """The handler, while the block runs; the earlier ones come back after it."""
    earlier = {signum: signal.signal(signum, handler) for signum in signals}
    try:
        yield
    finally:
        for signum, former in earlier.items():
            signal.signal(signum, former)


@dataclass
class Interrupt:
    """`signum` is the signal that asked this process to stop, 0 until then."""

    signum: int = 0
    signum_on_all_ranks: int = 0
    """the signal that all ranks stop for"""

    def is_requested(self) -> bool:
        """Whether this process was asked to stop."""
        return self.signum != 0

    def receive(self, signum: int, frame: FrameType | None) -> None:
        if self.signum and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = signum


@contextmanager
def listen(interrupt: Interrupt | None = None, signals: Collection[int] = SIGNALS) -> Iterator[Interrupt]:
    """Signals are noted while the block runs, in `interrupt` where one is given; the earlier handlers come back after.

    While a run is only being prepared, those `FROM_SCHEDULERS` are: they would end the process before it can put its
    job back into the queue. Ctrl-C may.
    """
    interrupt = interrupt or Interrupt()
    with handlers(signals, interrupt.receive):
        yield interrupt
