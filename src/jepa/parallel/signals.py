"""Signal handlers that are installed while a block runs."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from jepa.errors import Interrupted

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
FROM_SCHEDULERS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
SIGNALS = tuple(dict.fromkeys((*STOPS, *FROM_SCHEDULERS)))
AGAIN = "press Ctrl-C again to stop now"
TERMINAL = "JEPA_TERMINAL"
"""Environment variable with the descriptor of the terminal while the errors of this process go to a file."""


def say(line: str) -> None:
    """Print a line at once, also while another print is interrupted; of several ranks only the first does."""
    if (os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0") == "0":
        terminal = int(os.environ.get(TERMINAL, "2"))
        after_echo = "\n" if os.isatty(terminal) else ""  # a terminal shows ^C at the end of a line
        with suppress(OSError):
            os.write(terminal, f"{after_echo}{line}\n".encode())


def leave(signum: int, frame: FrameType | None) -> None:
    """End the process, which has begun nothing yet; an exception would break the imports that it interrupts."""
    say("stopped before anything was begun; the same command starts again")
    os._exit(128 + signum)


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
    """Answer the next Ctrl-C and raise KeyboardInterrupt; later ones end the process. Python's handler always raises.

    Unblocks SIGINT, which `no_interrupts` has blocked when it started this process. A Ctrl-C during the removal of an
    object, from where Python lets no exception out, ends the process too.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    sys.unraisablehook = _end_if_interrupted
    if signal.getsignal(signal.SIGINT) in (signal.SIG_DFL, signal.default_int_handler, leave):
        signal.signal(signal.SIGINT, _raise_once)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def interrupt_no_more() -> None:
    """Let the next Ctrl-C end the process: all is done, and an exception would disturb the exit of the interpreter."""
    if signal.getsignal(signal.SIGINT) is _raise_once:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _raise_once(signum: int, frame: FrameType | None) -> None:
    interrupt_no_more()
    say(f"stopping; {AGAIN}")
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
    is_raised: bool = False
    """True while a signal raises Interrupted."""
    in_command: bool = field(default_factory=lambda: signal.getsignal(signal.SIGINT) != signal.default_int_handler)
    """True in a command, which a second Ctrl-C ends at once; in a program of the user it raises KeyboardInterrupt."""

    def is_requested(self) -> bool:
        return self.signum != 0

    def receive(self, signum: int, frame: FrameType | None) -> None:
        if self.signum and signum == signal.SIGINT:
            if self.in_command:
                say("stopped at once; the same command goes on from the last checkpoint, if there is one")
                os._exit(128 + signum)
            raise KeyboardInterrupt
        if signum == signal.SIGINT:
            say(f"stopping {'and saving' if self.is_raised else 'after this step'}; {AGAIN}")
        if signum == signal.SIGHUP:
            mute_closed_terminal()
        self.signum = signum
        if self.is_raised:
            self.is_raised = False
            raise Interrupted

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Raise Interrupted for a signal received while the block runs, or before: nothing in it has to be ended."""
        if self.signum:
            raise Interrupted
        self.is_raised = True
        try:
            yield
        finally:
            self.is_raised = False


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
