"""What data sets of files share: the held-out part, tables, and labels as text."""

from __future__ import annotations

import copy
import csv
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

NO_LABEL = {"", "-1"}
"""texts of a sample without a label"""


class HoldingOut:
    """A data set that can hold a part of itself out; `_take` takes what a part consists of."""

    held_out: Self | None = None
    _take: Callable[..., None]

    def validation(self) -> Self | None:
        return self.held_out

    def _apart(self, *part: Any) -> Self:
        other = copy.copy(self)
        other._take(*part)
        return other


def has_suffix(path: str, suffixes: tuple[str, ...]) -> bool:
    """True for visible files with one of the suffixes."""
    name = os.path.basename(path)
    return name.lower().endswith(suffixes) and not name.startswith(".")


def sub_folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def read_table(path: Path, key: str, columns: Sequence[str]) -> dict[str, list[Any]]:
    """The columns by name; raises ValueError where the file or one of `columns` is lacking."""
    if not path.is_file():
        raise ValueError(f"{key}: there is no file {path}")
    table = _parquet(path, key) if path.suffix == ".parquet" else _csv(path)
    if lacking := [name for name in columns if name not in table]:
        raise ValueError(f"{key}={path}: no column {', '.join(lacking)}; its first line names {', '.join(table)}")
    return table


def _csv(path: Path) -> dict[str, list[Any]]:
    with open(path, newline="", encoding="utf-8-sig") as file:
        header, *rows = [row for row in csv.reader(file) if row] or [[]]
    if uneven := next((row for row in rows if len(row) != len(header)), None):
        raise ValueError(f"{path}: the line {','.join(uneven)} has {len(uneven)} values, the first line {len(header)}")
    return {name.strip(): [row[number].strip() for row in rows] for number, name in enumerate(header)}


def _parquet(path: Path, key: str) -> dict[str, list[Any]]:
    try:
        from pyarrow import parquet
    except ImportError as fault:
        raise ValueError(f"{key}={path}: parquet files need pip install 'jepa-train[hf]'") from fault
    return parquet.read_table(path).to_pydict()


def class_names(labels: Iterable[str]) -> tuple[str, ...]:
    """The numbers up to the largest where all labels are whole numbers, or else the names that occur."""
    names = set(labels) - NO_LABEL
    if not all(map(str.isdecimal, names)):
        return tuple(sorted(names))
    return tuple(map(str, range(max(map(int, names), default=-1) + 1)))


def class_numbers(labels: Sequence[str], classes: Sequence[str], where: str, numbered: bool = False) -> np.ndarray:
    """Long [n], -1 where there is none: a label is the name of a class or, where they are `numbered`, also its number.

    Raises ValueError for what is neither.
    """
    numbers = {name: number for number, name in enumerate(classes)}
    if numbered:
        digits = {str(number): number for number in range(len(classes))}
        numbers = numbers | digits if all(map(str.isdecimal, classes)) else digits | numbers
    plain = {text: str(int(text)) if text.isdecimal() and text not in numbers else text for text in set(labels)}
    found = {text: numbers.get(key) for text, key in plain.items()} | dict.fromkeys(NO_LABEL, -1)
    if unknown := sorted(text for text, number in found.items() if number is None):
        raise ValueError(f"{where}: labels that are not among the {len(classes)} classes: {unknown[:5]}")
    return np.array([found[text] for text in labels], dtype=np.int64)
