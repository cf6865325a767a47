"""Tables that tell about files: CSV with a header, or parquet."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


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


def class_numbers(
    values: Sequence[Any], classes: tuple[str, ...] | None, key: str
) -> tuple[tuple[str, ...], np.ndarray]:
    """Names of the classes (those that are given, or all in the column) and the labels; -1 where there is none.

    Whole numbers are labels themselves, other values are names.
    """
    texts = ["" if value is None else str(value) for value in values]
    named = {text for text in texts if text not in ("", "-1")}
    if classes is None:
        are_numbers = all(text.isdecimal() for text in named)
        highest = max(map(int, named), default=-1) if are_numbers else -1
        classes = tuple(map(str, range(highest + 1))) if are_numbers else tuple(sorted(named))
    if unknown := sorted(named - set(classes)):
        raise ValueError(f"{key} has classes that the training part has not: {unknown[:8]}")
    numbers = {name: number for number, name in enumerate(classes)}
    return classes, np.array([numbers.get(text, -1) for text in texts], dtype=np.int64)
