"""SIGINT, SIGTERM, SIGUSR1 and SIGUSR2 finish the step in hand; a second SIGINT stops at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from jepa.signals import handlers

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


@dataclass
class Interrupt:
    """`signum` is the signal that asked this process to stop, 0 until then."""

    signum: int = 0
    agreed: int = 0
    """the signal that all ranks stop for"""

    def receive(self, signum: int, frame: FrameType | None) -> None:
        if self.signum and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = signum


@contextmanager
def listen() -> Iterator[Interrupt]:
    """Signals are noted while the block runs; the earlier handlers come back after it."""
    interrupt = Interrupt()
    with handlers(SIGNALS, interrupt.receive):
        yield interrupt
