"""Samples of a data set for evaluation: in order or shuffled, read by workers, cached in memory up to a limit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset as TorchDataset

from jepa.data.loader import UNREADABLE, first_line, name_unreadable, read_in_order
from jepa.errors import RunError, SourceError
from jepa.parallel.bars import bar
from jepa.types import Dataset, DatasetTraits, RawBatch, Sample

THUMBNAIL = 32
"""Height and width of thumbnails in pixels."""
PIXELS_SIDE = 16
"""Longest side in pixels of the raw-pixel baseline's images: better than 32 on CIFAR-10, at a tenth of the cost."""
Reduce = Callable[[Sequence[Tensor]], Any]
"""uint8 [C, T, H, W] of any size -> values of a batch, usually [b, ...]; runs in a worker"""


class SampleBatch(NamedTuple):
    values: Any
    """result of `reduce`, usually [b, ...]"""
    labels: Tensor
    """long [b]"""
    rows: Tensor
    """long [b]: positions in the split, without unreadable samples"""
    fields: dict[str, list[Tensor]]
    """one tensor per sample"""


@dataclass(frozen=True, kw_only=True)
class Split:
    """Samples of a data set in a fixed order."""

    dataset: Dataset
    name: str
    """training, validation or test; for messages"""
    indices: tuple[int, ...]
    num_workers: int = 0
    broken: dict[int, str] = field(default_factory=dict)
    """Index and reason of each unreadable sample; grows while samples are read."""

    def note_broken(self, index: int, reason: str) -> None:
        if index not in self.broken:
            name_unreadable(self.dataset, index, lambda _: reason)
        self.broken[index] = reason


class Samples:
    """Reads a split without its unreadable samples; values of at most `max_bytes` are read once and cached.

    `batch_size` counts images: batches of clips are smaller by the number of frames. `title` is that of the progress
    bar of a pass in order. `may_be_empty` takes the error away if none can be read.
    """

    def __init__(
        self, *, split: Split, reduce: Reduce, batch_size: int, fields: Sequence[str] = (), max_bytes: int = 0,
        title: str = "", may_be_empty: bool = False,
    ) -> None:  # fmt: skip
        self.split = split
        self.batch_size = max(1, batch_size // DatasetTraits.of(split.dataset).num_frames)
        self.max_bytes = max_bytes
        self.title = title
        self.rows = torch.empty(0, dtype=torch.long)
        """Positions in the split of the readable samples, after a first pass in order."""
        self._reader = _Reader(split, reduce, fields)
        self._cached: list[SampleBatch] = []
        self._fits = max_bytes > 0
        self._may_be_empty = may_be_empty

    def batches(self) -> Iterator[SampleBatch]:
        """The samples in the order of the split. Raises RunError if none can be read."""
        if self._cached:
            yield from self._cached
            return
        batches, rows = [], []
        order = torch.arange(len(self.split.indices))
        with progress(len(order), self.title and f"{self.title} ({self.split.name})") as advance:
            for batch in self._read(order, self.batch_size):
                self._fits = batch.values[0].nbytes * len(order) <= self.max_bytes
                batches += [batch] if self._fits else []
                rows.append(batch.rows)
                yield batch
                advance(len(batch.rows))
        self._cached, self.rows = batches, torch.cat(rows) if rows else self.rows

    def shuffled(self, batch_size: int, rng: Generator) -> Iterator[SampleBatch]:
        """The samples in random order, `batch_size` at a time. Raises RunError if none can be read."""
        if self._fits and not self._cached:
            for _ in self.batches():  # fills the cache, or ends with the first batch if the values do not fit
                if not self._fits:
                    break
        if not self._cached:
            yield from self._read(torch.randperm(len(self.split.indices), generator=rng), batch_size)
            return
        positions = [(batch, row) for batch in self._cached for row in range(len(batch.rows))]
        for chosen in torch.randperm(len(positions), generator=rng).split(batch_size):
            yield _gather([positions[index] for index in chosen.tolist()])

    def _read(self, order: Tensor, batch_size: int) -> Iterator[SampleBatch]:
        split, num_read = self.split, 0
        lists = [rows.tolist() for rows in order.split(batch_size)]
        with closing(read_in_order(self._reader, lists, split.num_workers)) as stream:
            for batch, unread in stream:
                for row, reason in unread.items():
                    split.note_broken(split.indices[row], reason)
                if batch is not None:
                    num_read += len(batch.rows)
                    yield batch
        if num_read == 0 and not self._may_be_empty:
            first = split.indices[0]
            name = f"{split.dataset.describe(first)}: {split.broken[first]}"
            raise RunError(f"no {split.name} sample can be read; the first: {name}")


class _Reader(TorchDataset):
    """Runs in a worker: positions in the split -> a batch, and the reason for each position that cannot be read."""

    def __init__(self, split: Split, reduce: Reduce, fields: Sequence[str]) -> None:
        self.dataset, self.indices = split.dataset, split.indices
        self.reduce, self.fields = reduce, fields

    def __getitem__(self, rows: list[int]) -> tuple[SampleBatch | None, dict[int, str]] | str:
        samples, unread = {}, {}
        for row in rows:
            try:
                samples[row] = Sample(*self.dataset[self.indices[row]])
            except UNREADABLE as error:
                unread[row] = first_line(error)
            except SourceError as error:
                return str(error)
        if not samples:
            return None, unread
        clips, labels, values = zip(*samples.values(), strict=True)
        fields = {name: [sample[name] for sample in values] for name in self.fields}
        return SampleBatch(self.reduce(clips), torch.tensor(labels), torch.tensor([*samples]), fields), unread


def _gather(positions: Sequence[tuple[SampleBatch, int]]) -> SampleBatch:
    """The batch of single rows of other batches."""
    samples = [(batch.values[row], batch.labels[row], batch.rows[row]) for batch, row in positions]
    fields = {name: [batch.fields[name][row] for batch, row in positions] for name in positions[0][0].fields}
    values, labels, rows = map(torch.stack, zip(*samples, strict=True))
    return SampleBatch(values, labels, rows, fields)


@contextmanager
def progress(total: int | None, title: str, unit: str = "sample") -> Iterator[Callable[[int], object]]:
    """A function to call with the number of units just done; work with a title has a bar."""
    with bar(total=total, desc=title, unit=unit, disable=not title) as shown:
        yield shown.update


def thumbnails(pictures: Tensor) -> Tensor:
    """uint8 [b, C, T, H, W] -> uint8 [b, C, 32, 32], the middle frame"""
    return F.adaptive_avg_pool2d(pictures[:, :, pictures.shape[2] // 2].float(), THUMBNAIL).round().byte()


def raw_pixels(pictures: Tensor) -> Tensor:
    """uint8 [b, C, T, H, W] -> float32 [b, C * h * w] in [0, 1]: mean over the frames, at most 16 pixels per side"""
    height, width = pictures.shape[-2:]
    ratio = min(1.0, PIXELS_SIDE / max(height, width))
    size = (max(1, round(height * ratio)), max(1, round(width * ratio)))
    mean = pictures.sum(2, dtype=torch.float32) / pictures.shape[2]  # [b, C, H, W]
    return F.adaptive_avg_pool2d(mean / 255, size).flatten(1)


def raw_batch(pictures: Tensor, device: torch.device) -> RawBatch:
    """uint8 [b, C, T, H, W] -> the batch that the loader would deliver, without fields"""
    num, size = len(pictures), torch.tensor(pictures.shape[-2:])
    empty = torch.empty(0, dtype=torch.long)
    return RawBatch(pictures, size.expand(num, 2), {}, empty, empty).map(lambda tensor: tensor.to(device))
