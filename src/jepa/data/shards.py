"""Labelled images in tar shards of the WebDataset layout, in an order that reads few shards at a time."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from jepa.config.layouts import VALIDATION_NAMES
from jepa.config.paths import find_shards
from jepa.config.urls import is_url
from jepa.data.folders import HEAD, FileDataset, class_names, class_numbers, is_useful_held_out
from jepa.data.loader import Order
from jepa.data.remote import RemoteFile, UnreachableError, find_files, list_files, read_text, size_text
from jepa.data.shard_cache import ShardCache, say_patience
from jepa.data.shard_files import OpenFiles, RemoteFiles
from jepa.data.shard_index import Shard, read_index
from jepa.errors import SourceError
from jepa.seeding import generator
from jepa.types import Channels, Positive, PositiveInt

log = logging.getLogger(__name__)


class Shards(FileDataset):
    """Images in tar files: members that share a name up to its first dot are one sample.

    `shards` is a brace pattern, a glob, a folder or a file, and so is `val_shards`, the held-out part; None takes files
    or a folder with a default name beside the shards. The image is the member with the suffix `image_key`, by default
    any image suffix; the label, a number or a name, is the member cls or the field `label_key` of the member json. A
    classes.txt beside the shards names the classes. Samples are shuffled among `shuffle_shards` shards at a time; None
    shuffles among all.

    Shards may lie on a server (s3://, gs://, https://, hf://): they are copied when they are needed into the folder
    `cache`, by default in the user's cache, of at most `cache_size` gigabytes.
    """

    rules = ("jepa.data.rules.shards",)
    survey = "jepa.data.survey.look"

    def __init__(
        self, *, shards: str, val_shards: str | None = None, shuffle_shards: PositiveInt | None = 16,
        image_key: str | None = None, label_key: str = "label", channels: Channels = 3,
        max_value: Positive | None = None, cache: str | None = None, cache_size: Positive = 100,
    ) -> None:  # fmt: skip
        super().__init__(channels, max_value=max_value)
        self.shuffle_shards, self.cache = shuffle_shards, ShardCache(cache, cache_size)
        val_paths = None if val_shards is None else _find("dataset.val_shards", val_shards)
        paths, held_out = _split(_find("dataset.shards", shards), val_paths)
        say_where(paths, self.cache)
        index = read_index(paths, image_key, label_key, self.cache)
        self.classes = _listed_classes(paths) or _classes_of(index["label"])
        self._load(paths, index)
        if held_out:
            part = self._part(held_out, read_index(held_out, image_key, label_key, self.cache), val_paths is None)
            is_useful = is_useful_held_out(part.labels, self.classes, str(held_out[0]), is_named=val_paths is not None)
            self.held_out = part if is_useful else None
        self.warn_of_dark_images()

    def _load(self, paths: list[Shard], index: np.ndarray, lenient: bool = False) -> None:
        self.paths, self.index = paths, index
        labels, rows, counts = np.unique(index["label"], return_inverse=True, return_counts=True)
        texts = _names_of([label.decode() for label in labels.tolist()], _listed_classes(paths) or self.classes)
        where = f"shards in {folder_of(paths[0])}"
        self.labels = class_numbers(texts, self.classes, where, lenient=lenient, counts=counts.tolist())[rows]
        remote = [path for path in paths if isinstance(path, RemoteFile)]
        self.files = RemoteFiles(remote, self.cache) if remote else OpenFiles([Path(str(path)) for path in paths])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """uint8 [C, 1, H, W] and its label, or -1; raises OSError or RuntimeError if it cannot be read."""
        return self.decode(self.read(index)), int(self.labels[index])

    def read(self, index: int) -> bytes:
        shard, offset, size = self.index[["shard", "offset", "size"]][index].tolist()
        if size < 0:
            raise OSError("has no image")
        data = self.files.read(shard, size, offset)
        if len(data) < size:
            raise OSError(f"{len(data)} of {size} bytes are left of it; the shard has changed since its index was made")
        return data

    def describe(self, index: int) -> str:
        row = self.index[index]
        return f"{self.paths[row['shard']]}: {os.fsdecode(bytes(row['key']))}"

    def file(self, index: int) -> str:
        return str(self.paths[self.index["shard"][index]])

    def encoded(self, index: int) -> bytes:
        """The beginning of the image."""
        shard, offset, size = self._heads([index])[0].tolist()
        return self.files.head(shard, size, offset)

    def prepare(self, indices: Sequence[int]) -> None:
        """Read what `encoded` gives for these samples from the server, many at a time."""
        if isinstance(self.files, RemoteFiles):
            self.files.prepare(self._heads(indices))

    def _heads(self, indices: Sequence[int]) -> np.ndarray:
        """Shard, offset and size of the beginnings of images [n, 3]"""
        rows = self.index[np.asarray(indices, dtype=np.int64)]
        return np.stack([rows["shard"], rows["offset"], rows["size"].clip(0, HEAD)], axis=1)

    def outline(self, index: int) -> int:
        """Size of the image."""
        return int(self.index["size"][index])

    def index_order(self, batch_size: int, seed: int) -> Order:
        """Position -> index and epoch, for batches of any size."""
        counts = np.bincount(self.index["shard"], minlength=len(self.paths))
        prefetch = self.files.prefetch if isinstance(self.files, RemoteFiles) else None
        return window_shuffle(counts, self.shuffle_shards or len(counts), seed, prefetch)

    def modified(self, index: int) -> object:
        path = self.paths[self.index["shard"][index]]
        return path.identity if isinstance(path, RemoteFile) else super().modified(index)


def window_shuffle(
    counts: np.ndarray, width: int, seed: int, prefetch: Callable[[Sequence[int], Sequence[int]], None] | None = None
) -> Order:
    """Epochs over shards of `counts` samples: random order of shards, samples shuffled within `width` shards.

    `prefetch` is called with the shards of each window that begins and those of the next one.
    """
    total, starts = int(counts.sum()), np.cumsum(counts) - counts

    @lru_cache(maxsize=2)
    def shards_of(epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards in random order, and the offset at which each window of `width` shards ends."""
        shards = torch.randperm(len(counts), generator=generator(seed, epoch, 0, "shards")).numpy()
        return shards, np.add.reduceat(counts[shards], range(0, len(counts), width)).cumsum()

    @lru_cache(maxsize=1)
    def samples_of(epoch: int, window: int) -> np.ndarray:
        shards = shards_of(epoch)[0][window * width :][:width]
        if prefetch:
            later = shards_of(epoch)[0][(window + 1) * width :][:width]
            prefetch(shards.tolist(), (later if len(later) else shards_of(epoch + 1)[0][:width]).tolist())
        ranges = zip(starts[shards].tolist(), counts[shards].tolist(), strict=True)
        samples = np.concatenate([np.arange(start, start + count) for start, count in ranges])
        random = generator(seed, epoch, window, "order in shards")
        return samples[torch.randperm(len(samples), generator=random).numpy()]

    def at(position: int) -> tuple[int, int]:
        epoch, offset = divmod(position, total)
        ends = shards_of(epoch)[1]
        window = int(np.searchsorted(ends, offset, side="right"))
        return int(samples_of(epoch, window)[offset - int(ends[window])]), epoch  # counted from the end of the window

    return at


def say_where(paths: Sequence[Shard], cache: ShardCache) -> None:
    """Log where the shards are if they are on a server, and where they are copied to."""
    files = [path for path in paths if isinstance(path, RemoteFile)]
    if files:
        total = size_text(sum(file.size for file in files))
        log.info("data: %d files of %s from %s; cache: %s", len(files), total, folder_of(files[0]), cache)
        say_patience()


def folder_of(path: Shard) -> str:
    return str(path).rpartition("/")[0]


def _find(key: str, pattern: str) -> list[Shard]:
    try:
        paths: list[Shard] = [*find_files(pattern)] if is_url(pattern) else [*find_shards(pattern)]
    except ValueError as error:
        raise ValueError(f"{key}={pattern}: {error}") from error
    if isinstance(first := paths[0], Path):
        siblings = list(first.parent.glob(re.sub(r"\d", "?", first.name)))
        if len(paths) == 1 < len(siblings):
            hint = f"one of {len(siblings)} that are numbered alike; a shell expands braces that are not in quotes"
            log.warning("%s=%s: %s", key, pattern, hint)
    return paths


def _split(paths: list[Shard], held_out: list[Shard] | None) -> tuple[list[Shard], list[Shard]]:
    """Disjoint training and held-out shards; shards with a name of a held-out part are not trained on."""
    val_named = [path for path in paths if _first_word(path) in VALIDATION_NAMES]
    if held_out is None and len(val_named) < len(paths):
        beside, below = _neighbours(paths[0])
        choices = [[path for path in beside if _first_word(path) == name] for name in VALIDATION_NAMES]
        choices += [[path for path in below if folder_of(path).endswith(f"/{name}")] for name in VALIDATION_NAMES]
        held_out = next(filter(None, choices), [])
        if held_out:
            log.info("held-out part: %s and %d more (or dataset.val_shards)", held_out[0], len(held_out) - 1)
        elif isinstance(paths[0], RemoteFile):
            log.info("no shards beside these are named as a held-out part; dataset.val_shards=URL gives some")
        return [path for path in paths if path not in val_named], held_out
    training = [path for path in paths if path not in (held_out or ())]
    if not training:
        raise ValueError("dataset.val_shards: the held-out shards are all the shards there are")
    return training, held_out or []


def _neighbours(first: Shard) -> tuple[list[Shard], list[Shard]]:
    """The .tar files in the folder of a shard, and those in the folders next to it with names of a held-out part."""
    if isinstance(first, Path):
        parent = first.parent.parent
        below = [path for name in VALIDATION_NAMES for path in sorted((parent / name).glob("*.tar"))]
        return [*sorted(first.parent.glob("*.tar"))], [*below]
    parent = first.folder.rpartition("/")[0]
    depth = len(parent.partition("://")[2].split("/")) if "://" in parent else 0
    is_inside = depth >= (3 if first.url.startswith("hf://") else 1)  # of the bucket, or the repository of the hub
    patterns = [f"{first.folder}/*.tar", f"{parent}/[vtd]*/*.tar" if is_inside else ""]
    try:
        beside, below = map(list_files, patterns)
    except UnreachableError:
        raise
    except SourceError as error:
        log.info("the folder of the shards is not searched for a held-out part: %s", error)
        return [], []
    return [*beside], [*below]


def _first_word(path: Shard) -> str:
    return re.split(r"[-_.]", path.name)[0]


def _listed_classes(paths: Sequence[Shard]) -> tuple[str, ...]:
    """The lines of classes.txt beside the shards; none without the file."""
    first = paths[0]
    if isinstance(first, RemoteFile):
        lines = _remote_text(f"{first.folder}/classes.txt").splitlines()
    else:
        file = first.parent / "classes.txt"
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return tuple(line.strip() for line in lines if line.strip())


@lru_cache(maxsize=8)
def _remote_text(url: str) -> str:
    text = read_text(url)
    return "" if text.lstrip().startswith("<") else text  # a web page in place of an answer that there is no such file


def _names_of(labels: Sequence[str], classes: Sequence[str]) -> list[str]:
    """The name of the class of each label, which is a name or a number; other labels unchanged."""
    names = {name: name for name in classes}
    digits = {str(number): name for number, name in enumerate(classes)}
    by_label = names | digits if all(map(str.isdecimal, classes)) else digits | names
    plain = {text: str(int(text)) if text.isdecimal() and text not in by_label else text for text in labels}
    return [by_label.get(plain[text], text) for text in labels]


def _classes_of(labels: np.ndarray) -> tuple[str, ...]:
    try:
        return class_names([label.decode() for label in labels.tolist()])
    except ValueError as error:
        raise ValueError(f"dataset.shards: {error}; see label_key") from error
