"""Signal handlers that are installed while a block runs."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
FROM_SCHEDULERS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
SIGNALS = tuple(dict.fromkeys((*STOPS, *FROM_SCHEDULERS)))


@contextmanager
def handlers(signals: Collection[int], handler: Callable[..., Any] | signal.Handlers) -> Iterator[None]:
    """Install the handler while the block runs, then restore the previous ones; a HUP ignored by nohup stays so.

    Python allows it in the main thread only; in another, signals are left to whoever has started it.
    """
    is_main = threading.current_thread() is threading.main_thread()
    is_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    signals = [signum for signum in signals if is_main and not (signum == signal.SIGHUP and is_nohup)]
    previous = {signum: signal.signal(signum, handler) for signum in signals}
    try:
        yield
    finally:
        for item in previous.items():
            signal.signal(*item)


def interrupt_once() -> None:
    """Let the next Ctrl-C raise KeyboardInterrupt, and later ones end the process; Python's handler raises every time.

    Unblocks SIGINT, which `no_interrupts` has blocked when it started this process. A Ctrl-C during the removal of an
    object, from where Python lets no exception out, ends the process too.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    sys.unraisablehook = _end_if_interrupted
    if signal.getsignal(signal.SIGINT) in (signal.SIG_DFL, signal.default_int_handler):
        signal.signal(signal.SIGINT, _raise_once)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def interrupt_no_more() -> None:
    """Let the next Ctrl-C end the process: all is done, and an exception would disturb the exit of the interpreter."""
    if signal.getsignal(signal.SIGINT) is _raise_once:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _raise_once(signum: int, frame: FrameType | None) -> None:
    interrupt_no_more()
    raise KeyboardInterrupt


def _end_if_interrupted(unraisable: Any) -> None:
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        os._exit(128 + signal.SIGINT)
    sys.__unraisablehook__(unraisable)


@contextmanager
def no_interrupts() -> Iterator[None]:
    """Hold Ctrl-C back while the block runs; processes that it starts do so until they call `interrupt_once`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


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
            signal.signal(signum, signal.SIG_IGN)  # until `handlers` restores the previous one
            raise KeyboardInterrupt
        if signum == signal.SIGHUP:
            mute_closed_terminal()
        self.signum = signum


def mute_closed_terminal() -> None:
    """Discard the output to a terminal that was closed: writing to it is an error, also while the state is saved."""
    for descriptor in (1, 2):
        try:
            os.write(descriptor, b"")
        except OSError:
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, descriptor)
            os.close(devnull)


@contextmanager
def listen(interrupt: Interrupt | None = None, signals: Collection[int] = SIGNALS) -> Iterator[Interrupt]:
    """Record signals while the block runs, in `interrupt` if given.

    While a run is prepared only those `FROM_SCHEDULERS` are recorded: they would end the process before it can put its
    job back into the queue. Ctrl-C ends it.
    """
    interrupt = interrupt or Interrupt()
    with handlers(signals, interrupt.receive):
        yield interrupt
