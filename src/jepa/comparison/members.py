"""The members of a sweep on the console: a line each; what they print goes to a file in their folder. Without torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

from jepa.parallel.signals import TERMINAL
from jepa.reports.run_table import Column, table_columns
from jepa.reports.text import duration, printable
from jepa.reports.verdict import last_value, selection_metric
from jepa.runs.metrics import read_rows

OUTPUT = "output.log"
"""File in the folder of a member with all that it prints."""
WIDTH = 16
"""Width of the columns, in characters."""


def begun_line(folder: Path) -> str:
    """What a terminal shows until the line of the member takes its place; nothing elsewhere."""
    return f"{'training':<{WIDTH}}{folder}\r" if sys.stdout.isatty() else ""


def member_line(folder: Path, status: str, seconds: float | None, judge: str | None = None) -> str:
    """Status, main metric, time, folder (which says what varies), and of a failure the file that says why."""
    rows = read_rows(folder)
    name = selection_metric({name for row in rows if row["step"] > 0 for name in row}, judge)
    heads = {column.metric: column for column in table_columns(rows)}
    column = heads.get(name or "", Column(str(name), "", ""))
    measured = f"{column.head} {column.cell(last_value(rows, name, after=0))}" if name else "-"
    cells = [status, measured, "before" if seconds is None else duration(seconds)]
    erased = "\x1b[K" if sys.stdout.isatty() else ""
    why = f", see {folder / OUTPUT}" if status == "failed" else ""
    return printable(erased + "".join(f"{cell:<{WIDTH}}" for cell in cells) + f"{folder}{why}")


@contextmanager
def output_to(path: Path) -> Iterator[None]:
    """Append to a file all that this process, and those it starts, print while the block runs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8", errors="replace", buffering=1) as file:
        sys.stdout.flush()
        kept = [os.dup(1), os.dup(2)]
        os.environ[TERMINAL] = str(kept[1])
        try:
            for descriptor in (1, 2):
                os.dup2(file.fileno(), descriptor)
            with redirect_stdout(file), redirect_stderr(file):
                yield
        finally:
            del os.environ[TERMINAL]
            for descriptor, previous in enumerate(kept, start=1):
                os.dup2(previous, descriptor)
                os.close(previous)
