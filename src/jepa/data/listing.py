"""The files of a data set in folders: one walk for images, videos and frames, with an account of what it leaves out."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jepa.config.layouts import TRAINING_NAMES, VALIDATION_NAMES, find_training, held_out_folders, no_files
from jepa.config.paths import content, existing
from jepa.data.folders import is_useful_held_out, match_classes

log = logging.getLogger(__name__)
PART_NAMES = {*TRAINING_NAMES, *VALIDATION_NAMES}


class Files(NamedTuple):
    folder: Path
    paths: np.ndarray
    """paths in the folder, as one array of bytes: worker processes would copy a list of strings page by page"""
    labels: np.ndarray
    """long [n], -1 without a class"""


class Listing(NamedTuple):
    """The files of a folder and their classes, with the number of files or folders left out for each reason."""

    files: Files
    classes: tuple[str, ...]
    left_out: Counter[str]

    def __str__(self) -> str:
        kind = f"{len(self.classes)} classes of folders" if self.classes else "no classes"
        return account(f"{self.files.folder}: {kind}, {len(self.files.paths):,} files", self.left_out)


def account(summary: str, left_out: Counter[str]) -> str:
    """One line: what is used, and the number of files left out for each reason."""
    reasons = "; ".join(f"{count:,} {reason}" for reason, count in left_out.most_common() if count)
    return summary + (reasons and f"; left out: {reasons}")


def list_files(
    folder: Path, suffixes: tuple[str, ...], classes: Sequence[str] | None = None, level: int | None = None
) -> Listing:
    """All visible files with one of the suffixes; a file of the class CLASS is at any depth below `folder`/CLASS.

    That is `level` 1, the default; level 2 has the classes at `folder`/ANY/CLASS, level 0 takes all files without
    classes. Without `classes`, the sub-folders with files are the classes; by default a folder that holds as many files
    itself as its only sub-folder, or more, has no classes. With `classes`, as of a held-out part, the sub-folders are
    matched to them by name, also in other capitals. Links to folders are followed, except to a folder that is listed
    anyway. Raises ValueError if `folder` cannot be read, or if most of its files are in no class folder.
    """
    walk = Walk(folder, suffixes)
    by_folder: dict[str, list[str]] = {}
    for path in walk.files():
        parts = path.split("/")[:-1]
        number = 1 if level is None else level
        by_folder.setdefault(parts[number - 1] if 0 < number <= len(parts) else "", []).append(path)
    loose = by_folder.pop("", [])
    left_out = walk.left_out()
    num_inside = sum(map(len, by_folder.values()))
    if level is None and classes is None and len(by_folder) > 1 and num_inside < len(loose):
        raise ValueError(
            f"{folder} holds {len(loose):,} files itself and {num_inside:,} in sub-folders: dataset.class_level=0 "
            "takes all of them without classes, dataset.class_level=1 those in sub-folders, which are the classes"
        )
    if level is None and len(by_folder) == 1 and num_inside <= len(loose):
        left_out.update({f'in the sub-folder "{printable(name)}"': len(paths) for name, paths in by_folder.items()})
        by_folder.clear()
    if by_folder and loose:
        left_out["in no class folder"] += len(loose)
    own_classes = tuple(map(printable, sorted(by_folder)))
    numbers = match_classes(own_classes, _numbers(own_classes if classes is None else classes))
    paths, labels = [], []
    for name in sorted(by_folder):
        number, inside = numbers.get(printable(name)), sorted(by_folder[name], key=os.path.split)
        if number is None:
            left_out[f'of the unknown class "{printable(name)}"'] += len(inside)
        else:
            paths += inside
            labels += [number] * len(inside)
    if not by_folder:
        paths, labels = sorted(loose), [-1] * len(loose)
    names = np.array([os.fsencode(path) for path in paths], dtype=bytes)
    return Listing(Files(folder, names, np.array(labels, dtype=np.int64)), own_classes, left_out)


def list_all(path: Path, suffixes: tuple[str, ...], kind: str) -> Files:
    """All visible files with one of the suffixes at any depth below a folder, without classes; or one file alone.

    Raises ValueError if there are none.
    """
    walk = Walk(path, suffixes)
    is_file = path.is_file()
    names = [path.name] * path.name.lower().endswith(suffixes) if is_file else list(walk.files())
    if not names:
        raise ValueError(f"no {kind} ({' '.join(suffixes)}) in {path}; {content(path)}")
    if not is_file:
        log.info("%s", account(f"{path}: {len(names):,} {kind}", walk.left_out()))
    folder = path.parent if is_file else path
    paths = np.array([os.fsencode(name) for name in names], dtype=bytes)
    return Files(folder, paths, np.full(len(names), -1, dtype=np.int64))


def training_folder(folder: Path) -> Path:
    """The training part of a folder whose sub-folders are the parts of a data set, or else the folder itself."""
    names = {entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")}
    training = [name for name in TRAINING_NAMES if name in names]
    if not training or len(names) < 2 or not {name.lower() for name in names} <= PART_NAMES:
        return folder
    log.info("%s holds the parts %s of a data set: training on %s", folder, ", ".join(sorted(names)), training[0])
    return folder / training[0]


def list_training(
    root: Path, part: str | None, suffixes: tuple[str, ...], key: str, level: int | None = None
) -> Listing:
    """The files of `root`/`part`, or of the part that `find_training` finds; `key` is the key of `part`."""
    folder = root / (find_training(root, suffixes, key) if part is None else part)
    listing = list_files(training_folder(existing(folder, key, "folder")), suffixes, level=level)
    if not len(listing.files.paths):
        folder = listing.files.folder
        raise ValueError(no_files(folder, suffixes))
    return listing


def held_out_listing(
    training: Listing, root: Path, val_folder: str | None, suffixes: tuple[str, ...], level: int | None = None
) -> Listing | None:
    """The files of `root`/`val_folder`, or of a folder with a usual name beside the training part; None without.

    Logs what is trained on and held out, and why a folder is not used. Raises ValueError if `val_folder` has classes
    that the training part does not have.
    """
    (folder, _, _), classes, _ = training
    if val_folder is not None:
        folders = [existing(root / val_folder, "dataset.val_folder", "folder")]
    else:
        folders = held_out_folders(folder, root)
    for candidate in folders:
        listing = list_files(candidate, suffixes, classes, level)
        unknown = sorted(set(listing.classes) - match_classes(listing.classes, _numbers(classes)).keys())
        if len(unknown) == 1 and not listing.files.paths.size:  # perhaps a folder that holds nothing but another one
            inner = list_files(candidate / unknown[0], suffixes, classes, level)
            if not classes or (inner.files.labels >= 0).any():
                listing, unknown = inner, []
        if val_folder is not None and unknown:
            raise ValueError(f"dataset.val_folder={val_folder} has classes that are not in {folder}: {unknown}")
        if not listing.files.paths.size:
            log.warning("%s is not used as the held-out part: it has %s", candidate, _reason(listing, unknown))
        elif is_useful_held_out(listing.files.labels, classes, str(candidate), is_named=val_folder is not None):
            hint = "" if val_folder else " (dataset.val_folder names another)"
            part = f"{listing.files.folder}, {len(listing.files.paths):,} files{hint}"
            log.info("%s; for evaluation %s", training, account(part, listing.left_out))
            return listing
    log.info("%s", training)
    return None


def _reason(listing: Listing, unknown: Sequence[str]) -> str:
    """What a folder holds in place of usable files."""
    return f"other classes ({', '.join(unknown[:5])})" if unknown else f"no files of this type ({listing})"


def _numbers(classes: Iterable[str]) -> dict[str, int]:
    return {name: number for number, name in enumerate(classes)}


def printable(name: str) -> str:
    """The name of a folder as text that can be printed and saved, also if it is not UTF-8."""
    return os.fsencode(name).decode(errors="backslashreplace")


class Walk:
    """The files below a folder, and what was met on the way."""

    def __init__(self, folder: Path, suffixes: tuple[str, ...]) -> None:
        self.folder, self.suffixes = folder, suffixes
        self.folders_listed = [os.path.realpath(folder)]
        self.reasons: Counter[str] = Counter()
        self.other_suffixes: Counter[str] = Counter()

    def files(self, folder: str = "") -> Iterator[str]:
        """Paths relative to the top folder; hidden files and folders have none."""
        try:
            entries = sorted(os.scandir(self.folder / folder), key=lambda entry: entry.name)
        except OSError as error:
            if not folder:
                raise ValueError(f"{self.folder} cannot be read: {error.strerror}") from error
            self.reasons["folders that cannot be read"] += 1
            return
        for entry in entries:
            path = f"{folder}/{entry.name}" if folder else entry.name
            if entry.name.startswith("."):
                continue
            if entry.is_symlink():
                yield from self._linked(entry, path)
            elif entry.is_dir():
                yield from self.files(path)
            else:
                yield from self._readable(path)

    def _linked(self, entry: os.DirEntry[str], path: str) -> Iterator[str]:
        if not os.path.exists(entry.path):
            self.reasons["broken links"] += 1
        elif not os.path.isdir(entry.path):
            yield from self._readable(path)
        elif any(_overlap(os.path.realpath(entry.path), listed) for listed in self.folders_listed):
            self.reasons["links to folders that are listed anyway"] += 1
        else:
            self.folders_listed.append(os.path.realpath(entry.path))
            yield from self.files(path)

    def _readable(self, path: str) -> Iterator[str]:
        if path.lower().endswith(self.suffixes):
            yield path
        else:
            self.other_suffixes[os.path.splitext(path)[1].lower() or "no suffix"] += 1

    def left_out(self) -> Counter[str]:
        reasons = Counter(self.reasons)
        if self.other_suffixes:
            names = ", ".join(printable(suffix) for suffix, _ in self.other_suffixes.most_common(5))
            reasons[f"files of other types ({names})"] = self.other_suffixes.total()
        return reasons


def _overlap(path: str, other: str) -> bool:
    """True if one of two folders is the other or holds it."""
    return os.path.commonpath([path, other]) in (path, other)
