"""What data sets of files share: the held-out part, tables, and labels as text."""

from __future__ import annotations

import copy
import csv
import fcntl
import io
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import numpy as np
from torch import Tensor

from jepa.data.bands import measure, show
from jepa.data.decode import dark_images_warning, decode, find_channels, warn_of_slow_decoding
from jepa.data.parquet import read_columns

log = logging.getLogger(__name__)
NO_LABEL = {"", "-1"}
"""Texts of a missing label."""
MOST_SINGLE_CLASSES = 100
"""Number of samples up to which each may be of a class of its own."""
HEAD = 65_536
"""Number of bytes from the beginning of a file by which two data sets are compared."""
IMAGENET_STATS = {3: ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), 1: ((0.449,), (0.226,))}
"""Mean and standard deviation of ImageNet's pixels in [0, 1], by the number of channels."""


class FileDataset:
    """Base of the data sets of files; `_load` of a subclass stores the samples of one part."""

    held_out: Self | None = None
    describe: Callable[[int], str]
    _load: Callable[..., None]

    def __init__(self, channels: Any, *, max_value: float | None = None, has_videos: bool = False) -> None:
        if not has_videos:
            warn_of_slow_decoding()
        self.channels, self.max_value = channels, max_value
        self.mean, self.std = IMAGENET_STATS.get(channels, ((), ()))

    def validation(self) -> Self | None:
        return self.held_out

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, index: int) -> bytes:
        """The encoded image of a sample, of a clip the first one; raises OSError if it cannot be read."""
        with open(self.file(index), "rb") as file:
            return file.read()

    def decode(self, data: bytes) -> Tensor:
        """Encoded image -> uint8 [C, 1, H, W]"""
        return decode(data, channels=self.channels, max_value=self.max_value)

    def find_channels(self) -> None:
        """Take the number of channels from the first file and, where no statistics are known, measure them on files.

        They are a function of the files alone, and a run keeps them beside its weights.
        """
        first = self.file(0)
        if self.channels is None:
            try:
                self.channels = find_channels(self.read(0))
            except OSError as error:
                raise ValueError(f"dataset.channels=null: {first}: {error}; set the number of channels") from error
            self.mean, self.std = IMAGENET_STATS.get(self.channels, ((), ()))
            log.info("dataset.channels: %d, as in the first file, %s", self.channels, first)
        if self.channels not in IMAGENET_STATS or first.lower().endswith(".npy"):
            self.mean, self.std = measure(lambda index: self.decode(self.read(index)), len(self))
            log.info("measured on files: mean %s; standard deviation %s", show(self.mean), show(self.std))

    def warn_of_dark_images(self) -> None:
        if self.max_value is None and (warning := dark_images_warning(self.read, len(self), self.channels)):
            log.warning("%s %s", self.describe(0), warning)

    def file(self, index: int) -> str:
        """Path of the file that holds the sample, or the beginning of it."""
        return self.describe(index)

    def encoded(self, index: int) -> bytes:
        """Size and first bytes of the file."""
        with open(self.file(index), "rb") as file:
            return str(os.fstat(file.fileno()).st_size).encode() + file.read(HEAD)

    def outline(self, index: int) -> Any:
        """Size of the file."""
        return os.stat(self.file(index)).st_size

    def modified(self, index: int) -> Any:
        """Size and time of the file; None if it is not there."""
        try:
            stat = os.stat(self.file(index))
        except OSError:
            return None
        return stat.st_size, stat.st_mtime_ns

    def _part(self, *samples: Any) -> Self:
        """A data set with the same settings and other samples."""
        part = copy.copy(self)
        part._load(*samples)
        return part


def user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jepa-train"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file, which is created; on a file system without locks nobody waits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_UN)  # a process that was forked in the meantime holds the file open


def is_locked(path: Path) -> bool:
    """True if a process holds the lock of a file."""
    try:
        with path.open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def has_suffix(path: str, suffixes: tuple[str, ...]) -> bool:
    """True for visible files with one of the suffixes."""
    name = os.path.basename(path)
    return name.lower().endswith(suffixes) and not name.startswith(".")


def read_table(path: Path, key: str, columns: Sequence[str]) -> dict[str, list[Any]]:
    """All columns by name; raises ValueError if the file or one of `columns` is missing."""
    if not path.is_file():
        raise ValueError(f"{key}: there is no file {path}")
    table = read_columns(path, key) if path.suffix == ".parquet" else _csv(path)
    if missing := [name for name in columns if name not in table]:
        raise ValueError(f"{key}={path}: no column {', '.join(missing)}; its first line names {', '.join(table)}")
    return table


def _csv(path: Path) -> dict[str, list[Any]]:
    try:
        return parse_csv(path.read_bytes(), str(path))
    except OSError as error:
        raise ValueError(f"{path}: is not readable as CSV: {error}") from error


def parse_csv(data: bytes, path: str) -> dict[str, list[str]]:
    """All columns by name. Raises ValueError that begins with `path`."""
    try:
        lines = io.StringIO(data.decode("utf-8-sig"), newline="")
        header, *rows = [row for row in csv.reader(lines) if row] or [[]]
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path}: is not readable as CSV: {error}") from error
    if uneven := next((row for row in rows if len(row) != len(header)), None):
        raise ValueError(f"{path}: the line {','.join(uneven)} has {len(uneven)} values, the first line {len(header)}")
    return {name.strip(): [row[number].strip() for row in rows] for number, name in enumerate(header)}


def class_names(labels: Sequence[str]) -> tuple[str, ...]:
    """The numbers up to the largest if all labels are whole numbers, else the different names.

    Raises ValueError for numbers that cannot be classes, such as the ids of samples.
    """
    names = set(labels) - NO_LABEL
    if negative := sorted(name for name in names if re.fullmatch(r"-\d+", name)):
        raise ValueError(f"the label {negative[0]} is no class; only -1 stands for a sample without a label")
    if len(names) == len(labels) > MOST_SINGLE_CLASSES:
        raise ValueError(f"the {len(labels):,} labels are all different, so they are no classes but ids or names")
    if not all(map(str.isdecimal, names)):
        return tuple(sorted(names))
    largest = max(map(int, names), default=-1)
    if largest >= max(10_000, len(labels)):
        raise ValueError(f"the label {largest} is no class of {len(labels):,} samples")
    return tuple(map(str, range(largest + 1)))


def class_numbers(
    labels: Sequence[str], classes: Sequence[str], where: str, *, lenient: bool = False, counts: Sequence[int] = ()
) -> np.ndarray:
    """Long [n]: the number of the class that each label names, -1 without a label.

    `counts` are the numbers of samples of the labels, by default one each. A `lenient` reading, of a held-out part that
    nobody named, gives -1 to other labels and warns; else ValueError.
    """
    numbers = {name: number for number, name in enumerate(classes)}
    plain = {text: str(int(text)) if text.isdecimal() and text not in numbers else text for text in set(labels)}
    matches = match_classes(plain.values(), numbers)
    by_text = {text: matches.get(name, -1) for text, name in plain.items()}
    if unknown := sorted(text for text, name in plain.items() if name not in matches.keys() | NO_LABEL):
        reason = f"{where}: labels that are not among the {len(classes)} classes: {unknown[:5]}"
        if not lenient:
            raise ValueError(reason)
        counted = zip(labels, counts or [1] * len(labels), strict=True)
        count = sum(number for text, number in counted if by_text[text] < 0 and text not in NO_LABEL)
        log.warning("%s; %s samples have no label therefore", reason, f"{count:,}")
    return np.array([by_text[text] for text in labels], dtype=np.int64)


def match_classes(names: Iterable[str], numbers: Mapping[str, int]) -> dict[str, int]:
    """The number of the class of each name, also in other capitals; without the names that match no class."""
    folded = {name.casefold(): number for name, number in numbers.items()}
    if len(folded) < len(numbers):  # classes that differ in capitals alone
        folded = {}
    matches = {name: numbers.get(name, folded.get(name.casefold())) for name in names}
    return {name: number for name, number in matches.items() if number is not None}


def is_useful_held_out(labels: np.ndarray, classes: Sequence[str], part: str, *, is_named: bool) -> bool:
    """True if a held-out part can be used; says so if it has no labels and the training part has some.

    A part that the user `is_named` is used all the same, but probes cannot be scored on it.
    """
    if not classes or (labels >= 0).any():
        return True
    reason = f"none of its {len(labels):,} samples has a label of the {len(classes)} classes"
    if is_named:
        log.warning("held-out part %s: %s, so no probe is scored on it", part, reason)
    else:
        log.warning("%s is not used as the held-out part: %s", part, reason)
    return is_named
