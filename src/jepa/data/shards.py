"""Labelled images in tar shards of the WebDataset layout, in an order that keeps the reads together."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from jepa.config.paths import find_shards
from jepa.data.decode import decode, warn_of_slow_decoding
from jepa.data.folders import HoldingOut, class_names, class_numbers, is_useful_held_out
from jepa.data.images import NATURAL
from jepa.data.listing import VALIDATION_NAMES
from jepa.data.shard_index import read_index
from jepa.seeding import generator
from jepa.types import Channels, PositiveInt

log = logging.getLogger(__name__)
MOST_OPEN = 64
"""open files in each process"""


class Shards(HoldingOut):
    """Images in tar files: members that share a name up to its first dot are one sample.

    `shards` is a brace pattern, a glob, a folder or a file; so is `val_shards`, the held-out part, of which None takes
    files or a folder of a usual name beside them. The image is the member `image_key`, None the one of a usual suffix;
    the label is the member cls, or the field `label_key` of the member json: a number or a name. A classes.txt beside
    the shards names the classes. Samples are dealt out of `shuffle_shards` shards at a time, None of all.
    """

    rules = ("jepa.data.rules.shards",)

    def __init__(
        self, *, shards: str, val_shards: str | None = None, shuffle_shards: PositiveInt | None = 16,
        image_key: str | None = None, label_key: str = "label", channels: Channels = 3,
    ) -> None:  # fmt: skip
        warn_of_slow_decoding()
        self.channels, self.shuffle_shards = channels, shuffle_shards
        self.mean, self.std = NATURAL[channels]
        paths = _find("dataset.shards", shards)
        named = None if val_shards is None else _find("dataset.val_shards", val_shards)
        paths, held_out = _parts(paths, named)
        index = read_index(paths, image_key, label_key)
        self.classes = _listed_classes(paths) or _classes_of(index["label"])
        self._take(paths, index)
        if held_out:
            part = self._apart(held_out, read_index(held_out, image_key, label_key), named is None)
            is_useful = is_useful_held_out(part.labels, self.classes, str(held_out[0]), is_named=named is not None)
            self.held_out = part if is_useful else None

    def _take(self, paths: list[Path], index: np.ndarray, lenient: bool = False) -> None:
        self.paths, self.index = paths, index
        labels, rows = np.unique(index["label"], return_inverse=True)
        texts = _names_of([label.decode() for label in labels.tolist()], _listed_classes(paths) or self.classes)
        self.labels = class_numbers(texts, self.classes, f"shards in {paths[0].parent}", lenient=lenient)[rows]
        self.files = _OpenFiles(paths)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """uint8 [C, 1, H, W] and its label, -1 without; raises OSError or RuntimeError when it can't be read."""
        shard, offset, size = self.index[["shard", "offset", "size"]][index].tolist()
        if size < 0:
            raise OSError("has no image")
        data = self.files.read(shard, size, offset)
        if len(data) < size:
            raise OSError(f"{len(data)} of {size} bytes are left of it; the shard has changed since its index was made")
        return decode(data, channels=self.channels), int(self.labels[index])

    def describe(self, index: int) -> str:
        row = self.index[index]
        return f"{self.paths[row['shard']]}: {os.fsdecode(bytes(row['key']))}"

    def index_order(self, batch_size: int, seed: int) -> Callable[[int], tuple[int, int]]:
        """Position -> index and epoch, for batches of any size."""
        counts = np.bincount(self.index["shard"], minlength=len(self.paths))
        return WindowShuffle(counts, self.shuffle_shards or len(counts), seed).take


class WindowShuffle:
    """Epochs over shards of `counts` samples: the shards in a drawn order, and `width` of them at a time shuffled."""

    def __init__(self, counts: np.ndarray, width: int, seed: int) -> None:
        self.counts, self.width, self.seed = counts, width, seed
        self.starts = np.cumsum(counts) - counts
        self._epoch = self._window = -1
        self._shards, self._ends, self._order = (np.empty(0, np.int64) for _ in range(3))

    def take(self, position: int) -> tuple[int, int]:
        epoch, offset = divmod(position, int(self.counts.sum()))
        if epoch != self._epoch:
            random = generator(self.seed, epoch, 0, "shards")
            self._shards = torch.randperm(len(self.counts), generator=random).numpy()
            self._ends = np.add.reduceat(self.counts[self._shards], range(0, len(self.counts), self.width)).cumsum()
            self._epoch, self._window = epoch, -1
        window = int(np.searchsorted(self._ends, offset, side="right"))
        if window != self._window:
            self._shuffle(window)
        return int(self._order[offset - int(self._ends[window])]), epoch  # counted from the end of the window

    def _shuffle(self, window: int) -> None:
        shards = self._shards[window * self.width :][: self.width]
        starts, counts = self.starts[shards].tolist(), self.counts[shards].tolist()
        samples = np.concatenate([np.arange(begin, begin + n) for begin, n in zip(starts, counts, strict=True)])
        random = generator(self.seed, self._epoch, window, "order in shards")
        self._order = samples[torch.randperm(len(samples), generator=random).numpy()]
        self._window = window


class _OpenFiles:
    """The `MOST_OPEN` shards that were read last; a process that is spawned opens its own."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths
        self._open: dict[int, int] = {}

    def read(self, shard: int, size: int, offset: int) -> bytes:
        file = self._open.pop(shard, None)
        if file is None:
            if len(self._open) >= MOST_OPEN:
                os.close(self._open.pop(next(iter(self._open))))
            file = os.open(self.paths[shard], os.O_RDONLY)
        self._open[shard] = file  # the last of the dictionary
        return os.pread(file, size, offset)

    def __reduce__(self) -> tuple[type[_OpenFiles], tuple[Sequence[Path]]]:
        return _OpenFiles, (self.paths,)

    def __del__(self) -> None:
        for file in self._open.values():
            os.close(file)


def _find(key: str, pattern: str) -> list[Path]:
    try:
        found = find_shards(pattern)
    except ValueError as fault:
        raise ValueError(f"{key}={pattern}: {fault}") from fault
    alike = list(found[0].parent.glob(re.sub(r"\d", "?", found[0].name)))
    if len(found) == 1 < len(alike):
        hint = f"one of {len(alike)} that are numbered alike; a shell expands braces that are not in quotes"
        log.warning("%s=%s: %s", key, pattern, hint)
    return found


def _parts(paths: list[Path], held_out: list[Path] | None) -> tuple[list[Path], list[Path]]:
    """Training and held-out shards, none of which is in both; what is named as if held out is not trained on."""
    usual = [path for path in paths if _first_word(path) in VALIDATION_NAMES]
    if held_out is None and len(usual) < len(paths):
        folder = paths[0].parent
        choices = [sorted(p for p in folder.glob("*.tar") if _first_word(p) == name) for name in VALIDATION_NAMES]
        choices += [sorted((folder.parent / name).glob("*.tar")) for name in VALIDATION_NAMES]
        held_out = next(filter(None, choices), [])
        if held_out:
            log.info("held-out part: %s and %d more (or dataset.val_shards)", held_out[0], len(held_out) - 1)
        return [path for path in paths if path not in usual], held_out
    training = [path for path in paths if path not in (held_out or ())]
    if not training:
        raise ValueError("dataset.val_shards: the held-out shards are all the shards there are")
    return training, held_out or []


def _first_word(path: Path) -> str:
    return re.split(r"[-_.]", path.name)[0]


def _listed_classes(paths: Sequence[Path]) -> tuple[str, ...]:
    """The lines of classes.txt beside the shards; none without the file."""
    file = paths[0].parent / "classes.txt"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return tuple(line.strip() for line in lines if line.strip())


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
