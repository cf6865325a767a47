"""Data sets of files: classes by sub-folder or table, and the held-out part."""

from __future__ import annotations

import copy
import csv
import fcntl
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from torch import Tensor
from torchvision.datasets.folder import make_dataset

from jepa.config.paths import existing
from jepa.data.decode import dark_images_warning, decode, warn_of_slow_decoding

log = logging.getLogger(__name__)
VALIDATION_NAMES = ("validation", "valid", "val", "test")
"""Default names of the folder or split with the held-out part, in order of preference."""
NO_LABEL = {"", "-1"}
"""Texts of a missing label."""
IMAGENET_STATS = {3: ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), 1: ((0.449,), (0.226,))}
"""Mean and standard deviation of ImageNet's pixels in [0, 1], by the number of channels."""


class FileDataset:
    """Base of the data sets of files; `_load` of a subclass stores the samples of one part."""

    held_out: Self | None = None
    describe: Callable[[int], str]
    _load: Callable[..., None]

    def __init__(self, channels: int, *, max_value: float | None = None, has_videos: bool = False) -> None:
        if not has_videos:
            warn_of_slow_decoding()
        self.channels, self.max_value = channels, max_value
        self.mean, self.std = IMAGENET_STATS[channels]

    def validation(self) -> Self | None:
        return self.held_out

    def read(self, index: int) -> bytes:
        """The encoded image; raises OSError if it cannot be read."""
        with open(self.describe(index), "rb") as file:
            return file.read()

    def decode(self, data: bytes) -> Tensor:
        """Encoded image -> uint8 [C, 1, H, W]"""
        return decode(data, channels=self.channels, max_value=self.max_value)

    def warn_of_dark_images(self) -> None:
        if self.max_value is None and (warning := dark_images_warning(self.read, len(self))):
            log.warning("%s %s", self.describe(0), warning)

    def __len__(self) -> int:
        raise NotImplementedError

    def _part(self, *samples: Any) -> Self:
        """A data set with the same settings and other samples."""
        part = copy.copy(self)
        part._load(*samples)
        return part


class Files(NamedTuple):
    folder: Path
    paths: np.ndarray
    """bytes [n], relative to `folder`; a list of strings would be copied into every worker, page by page"""
    labels: np.ndarray
    """long [n], -1 where there is none"""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file, which is created; on a file system without locks nobody waits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def has_suffix(path: str, suffixes: tuple[str, ...]) -> bool:
    """True for visible files with one of the suffixes."""
    name = os.path.basename(path)
    return name.lower().endswith(suffixes) and not name.startswith(".")


def sub_folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def class_folders(folder: Path, suffixes: tuple[str, ...]) -> tuple[str, ...]:
    """Names of the sub-folders with such files at any depth."""
    walks = {name: (f for *_, files in os.walk(folder / name) for f in files) for name in sub_folders(folder)}
    return tuple(name for name, files in walks.items() if any(has_suffix(f, suffixes) for f in files))


def scan(folder: Path, classes: Sequence[str], suffixes: tuple[str, ...]) -> Files:
    """All such files in the folders of `classes`; without classes, the files in the folder itself."""
    if classes:
        indices = {name: index for index, name in enumerate(classes)}
        samples = make_dataset(folder, indices, is_valid_file=lambda p: has_suffix(p, suffixes), allow_empty=True)
    else:
        names = sorted(name for name in os.listdir(folder) if has_suffix(name, suffixes))
        samples = [(os.path.join(folder, name), -1) for name in names]
    paths = [os.fsencode(os.path.relpath(path, folder)) for path, _ in samples]
    return Files(folder, np.array(paths, dtype=bytes), np.array([label for _, label in samples], dtype=np.int64))


def held_out_files(
    folder: Path, root: Path, val_folder: str | None, classes: tuple[str, ...], suffixes: tuple[str, ...]
) -> Files | None:
    """The files of `root`/`val_folder`, or of a sibling of `folder` with a default name and no other classes."""
    if val_folder is not None:
        sibling = existing(root / val_folder, "dataset.val_folder", "folder")
        if unknown := sorted(set(class_folders(sibling, suffixes)) - set(classes)):
            raise ValueError(f"dataset.val_folder={val_folder} has classes that are not in {folder}: {unknown}")
        return scan(sibling, classes, suffixes)
    for sibling in (folder.parent / name for name in VALIDATION_NAMES):
        if sibling == folder or not sibling.is_dir():
            continue
        sibling_classes = class_folders(sibling, suffixes)
        if not set(sibling_classes) <= set(classes) or bool(sibling_classes) != bool(classes):
            continue
        files = scan(sibling, classes, suffixes)
        if len(files.paths):
            log.info("held-out part: %s (name another with dataset.val_folder)", sibling)
            return files
    return None


def read_table(path: Path, key: str, columns: Sequence[str]) -> dict[str, list[Any]]:
    """All columns by name; raises ValueError if the file or one of `columns` is missing."""
    if not path.is_file():
        raise ValueError(f"{key}: there is no file {path}")
    table = _parquet(path, key) if path.suffix == ".parquet" else _csv(path)
    if missing := [name for name in columns if name not in table]:
        raise ValueError(f"{key}={path}: no column {', '.join(missing)}; its first line names {', '.join(table)}")
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
    except ImportError as error:
        raise ValueError(f"{key}={path}: parquet files need pip install 'jepa-train[hf]'") from error
    return parquet.read_table(path).to_pydict()


def class_names(labels: Iterable[str]) -> tuple[str, ...]:
    """All numbers up to the largest if every label is a whole number, else the sorted labels."""
    names = set(labels) - NO_LABEL
    if not all(map(str.isdecimal, names)):
        return tuple(sorted(names))
    return tuple(map(str, range(max(map(int, names), default=-1) + 1)))


def class_numbers(labels: Sequence[str], classes: Sequence[str], where: str, numbered: bool = False) -> np.ndarray:
    """Class numbers, long [n], -1 for a missing label; with `numbered` a label may be the number of its class.

    Raises ValueError for unknown labels.
    """
    numbers = {name: number for number, name in enumerate(classes)}
    if numbered:
        digits = {str(number): number for number in range(len(classes))}
        numbers = numbers | digits if all(map(str.isdecimal, classes)) else digits | numbers
    plain = {text: str(int(text)) if text.isdecimal() and text not in numbers else text for text in set(labels)}
    by_label = {text: numbers.get(key) for text, key in plain.items()} | dict.fromkeys(NO_LABEL, -1)
    if unknown := sorted(text for text, number in by_label.items() if number is None):
        raise ValueError(f"{where}: labels that are not among the {len(classes)} classes: {unknown[:5]}")
    return np.array([by_label[text] for text in labels], dtype=np.int64)
