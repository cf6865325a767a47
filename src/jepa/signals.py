"""Handlers of signals that stay for as long as a block runs."""

from __future__ import annotations

import signal
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def handlers(signals: Collection[int], handler: Callable[..., Any] | signal.Handlers) -> Iterator[None]:
    """The handler, while the block runs; the earlier ones come back after it."""
    earlier = {signum: signal.signal(signum, handler) for signum in signals}
    try:
        yield
    finally:
        for signum, former in earlier.items():
            signal.signal(signum, former)
