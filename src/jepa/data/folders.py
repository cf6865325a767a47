"""Files in folders: classes by sub-folder, and the held-out part beside them."""

from __future__ import annotations

import copy
import csv
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from torchvision.datasets.folder import make_dataset

from jepa.config.paths import existing
from jepa.data.parquet import read_columns

log = logging.getLogger(__name__)
VALIDATION_NAMES = ("validation", "valid", "val", "test")
"""of a folder or a split that is taken for the held-out part where none is named, in this order"""
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


class Files(NamedTuple):
    folder: Path
    paths: np.ndarray
    """in the folder, as an array: a list of strings would be copied into every worker, page by page"""
    labels: np.ndarray
    """-1 without"""


def has_suffix(path: str, suffixes: tuple[str, ...]) -> bool:
    """True for visible files with one of the suffixes."""
    name = os.path.basename(path)
    return name.lower().endswith(suffixes) and not name.startswith(".")


def sub_folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def class_folders(folder: Path, suffixes: tuple[str, ...]) -> tuple[str, ...]:
    """Names of the sub-folders that hold such files, at any depth."""
    walks = {name: (f for *_, files in os.walk(folder / name) for f in files) for name in sub_folders(folder)}
    return tuple(name for name, files in walks.items() if any(has_suffix(f, suffixes) for f in files))


def scan(folder: Path, classes: Sequence[str], suffixes: tuple[str, ...]) -> Files:
    """All such files with the numbers of their classes, or without classes those in the folder itself."""
    if classes:
        indices = {name: index for index, name in enumerate(classes)}
        found = make_dataset(folder, indices, is_valid_file=lambda p: has_suffix(p, suffixes), allow_empty=True)
    else:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        found = [(entry.path, -1) for entry in entries if has_suffix(entry.path, suffixes)]
    names = [os.fsencode(os.path.relpath(path, folder)) for path, _ in found]
    return Files(folder, np.array(names, dtype=bytes), np.array([label for _, label in found], dtype=np.int64))


def held_out_files(
    folder: Path, root: Path, val_folder: str | None, classes: tuple[str, ...], suffixes: tuple[str, ...]
) -> Files | None:
    """The files of `root`/`val_folder`, or of a folder beside `folder` with a usual name and no other classes."""
    if val_folder is not None:
        named = existing(root / val_folder, "dataset.val_folder", "folder")
        unknown = sorted(set(class_folders(named, suffixes)) - set(classes))
        if unknown:
            raise ValueError(f"dataset.val_folder={val_folder} has classes that are not in {folder}: {unknown}")
        return scan(named, classes, suffixes)
    for candidate in _siblings(folder):
        found = class_folders(candidate, suffixes)
        if not set(found) <= set(classes) or bool(found) != bool(classes):
            continue
        files = scan(candidate, classes, suffixes)
        if len(files.paths):
            log.info("held-out part: %s (name another with dataset.val_folder)", candidate)
            return files
    return None


def _siblings(folder: Path) -> Iterator[Path]:
    beside = (folder.parent / name for name in VALIDATION_NAMES)
    return (candidate for candidate in beside if candidate != folder and candidate.is_dir())


def read_table(path: Path, key: str, columns: Sequence[str]) -> dict[str, list[Any]]:
    """The columns by name; raises ValueError where the file or one of `columns` is lacking."""
    if not path.is_file():
        raise ValueError(f"{key}: there is no file {path}")
    table = read_columns(path, key) if path.suffix == ".parquet" else _csv(path)
    if lacking := [name for name in columns if name not in table]:
        raise ValueError(f"{key}={path}: no column {', '.join(lacking)}; its first line names {', '.join(table)}")
    return table


def _csv(path: Path) -> dict[str, list[Any]]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            header, *rows = [row for row in csv.reader(file) if row] or [[]]
    except (OSError, ValueError, csv.Error) as fault:
        raise ValueError(f"{path}: is not readable as CSV: {fault}") from fault
    if uneven := next((row for row in rows if len(row) != len(header)), None):
        raise ValueError(f"{path}: the line {','.join(uneven)} has {len(uneven)} values, the first line {len(header)}")
    return {name.strip(): [row[number].strip() for row in rows] for number, name in enumerate(header)}


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
