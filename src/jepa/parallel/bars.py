"""Bars of long work: they move on a terminal and in a notebook; elsewhere a line from time to time."""

from __future__ import annotations

import sys
from typing import Any

from tqdm.auto import tqdm
from tqdm.std import tqdm as TerminalBar

DELAY = 5
"""Seconds of work after which a bar appears."""
LINE_SECONDS = 60
"""Seconds between two lines where nothing can move."""


class Lines:
    """A file for a bar: what it would draw over itself becomes a line."""

    def write(self, text: str) -> None:
        if drawn := text.strip():
            print(drawn, file=sys.stderr, flush=True)

    def flush(self) -> None:
        sys.stderr.flush()


def can_move() -> bool:
    """True on a terminal and in a notebook."""
    return sys.stderr.isatty() or any("notebook" in base.__module__ for base in tqdm.__mro__)


def bar(*items: Any, delay: float = DELAY, **settings: Any) -> Any:
    """A bar of tqdm that disappears when the work is done; `items` is what it runs over, if it counts by itself."""
    if can_move():
        return tqdm(*items, delay=delay, leave=False, **settings)
    form = "{desc}: {n_fmt}/{total_fmt} {unit}, {remaining} left"
    return TerminalBar(
        *items, delay=LINE_SECONDS, mininterval=LINE_SECONDS, file=Lines(), leave=False, bar_format=form, **settings
    )
