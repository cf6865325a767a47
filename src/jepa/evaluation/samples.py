"""Samples of a data set for evaluation: in a fixed order or shuffled, read by workers, kept in memory up to a bound."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset as TorchDataset
from tqdm import tqdm

from jepa.data.loader import UNREADABLE, first_line, read_in_order
from jepa.errors import Interrupted, RunError
from jepa.types import Dataset, DatasetTraits, RawBatch, Sample

BAR_DELAY = 5
"""seconds after which work shows a progress bar on a terminal"""
THUMBNAIL = 32
"""height and width of thumbnails in pixels"""
PIXELS_SIDE = 16
"""longest side of the raw-pixel baseline's images: on CIFAR-10 better than 32, at a tenth of the cost"""
Reduce = Callable[[Sequence[Tensor]], Any]
"""uint8 [C, T, H, W] of any sizes -> what is kept of them, as a rule [b, ...]; it runs in a worker"""
log = logging.getLogger(__name__)


class SampleBatch(NamedTuple):
    values: Any
    """result of `reduce`, as a rule [b, ...]"""
    labels: Tensor
    """long [b]"""
    rows: Tensor
    """long [b]: positions in the split; unreadable samples are missing"""
    fields: dict[str, list[Tensor]]
    """one tensor a sample"""


@dataclass(frozen=True, kw_only=True)
class Split:
    """Samples of a data set in a fixed order."""

    dataset: Dataset
    name: str
    """training, validation or test, for messages"""
    indices: tuple[int, ...]
    num_workers: int = 0
    broken: dict[int, str] = field(default_factory=dict)
    """index of each unreadable sample with the reason; grows while samples are read"""

    def note_broken(self, index: int, reason: str) -> None:
        if index not in self.broken:
            log.warning("evaluation leaves out %s: %s", self.dataset.describe(index), reason)
        self.broken[index] = reason


class Samples:
    """Reads a split, without its unreadable samples; values that take at most `max_bytes` are read once and kept.

    `batch_size` counts images: batches of clips are smaller by the number of frames. A `title` gives a pass in order a
    progress bar.
    """

    def __init__(
        self, *, split: Split, reduce: Reduce, batch_size: int, fields: Sequence[str] = (), max_bytes: int = 0,
        title: str = "",
    ) -> None:  # fmt: skip
        self.split = split
        self.batch_size = max(1, batch_size // DatasetTraits.of(split.dataset).num_frames)
        self.max_bytes = max_bytes
        self.title = title
        self.rows = torch.empty(0, dtype=torch.long)
        """positions in the split of the readable samples, after a first pass in order"""
        self._reader = _Reader(split, reduce, fields)
        self._kept: list[SampleBatch] = []
        self._fits = max_bytes > 0

    def batches(self) -> Iterator[SampleBatch]:
        """The samples in the order of the split. Raises RunError if none can be read."""
        if self._kept:
            yield from self._kept
            return
        kept, rows = [], []
        order = torch.arange(len(self.split.indices))
        with progress(len(order), self.title and f"{self.title} ({self.split.name})") as advance:
            for batch in self._read(order, self.batch_size):
                self._fits = batch.values[0].nbytes * len(order) <= self.max_bytes
                kept += [batch] if self._fits else []
                rows.append(batch.rows)
                yield batch
                advance(len(batch.rows))
        self._kept, self.rows = kept, torch.cat(rows)

    def shuffled(self, batch_size: int, rng: Generator) -> Iterator[SampleBatch]:
        """The samples in random order, `batch_size` at a time. Raises RunError if none can be read."""
        if self._fits and not self._kept:
            self._keep()
        if not self._kept:
            yield from self._read(torch.randperm(len(self.split.indices), generator=rng), batch_size)
            return
        kept = [(batch, row) for batch in self._kept for row in range(len(batch.rows))]
        for places in torch.randperm(len(kept), generator=rng).split(batch_size):
            yield _gather([kept[place] for place in places.tolist()])

    def _keep(self) -> None:
        """Reads all samples, or a first batch if they are too many to be kept."""
        for _ in self.batches():
            if not self._fits:
                return

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
        if num_read == 0:
            first = split.indices[0]
            name = f"{split.dataset.describe(first)}: {split.broken[first]}"
            raise RunError(f"no {split.name} sample can be read; the first: {name}")


class _Reader(TorchDataset):
    """What runs in a worker: positions in the split -> a batch, and the reasons of those that cannot be read."""

    def __init__(self, split: Split, reduce: Reduce, fields: Sequence[str]) -> None:
        self.dataset, self.indices = split.dataset, split.indices
        self.reduce, self.fields = reduce, fields

    def __getitem__(self, rows: list[int]) -> tuple[SampleBatch | None, dict[int, str]]:
        samples, unread = {}, {}
        for row in rows:
            try:
                samples[row] = Sample(*self.dataset[self.indices[row]])
            except UNREADABLE as fault:
                unread[row] = first_line(fault)
        if not samples:
            return None, unread
        clips, labels, values = zip(*samples.values(), strict=True)
        fields = {name: [of_one[name] for of_one in values] for name in self.fields}
        return SampleBatch(self.reduce(clips), torch.tensor(labels), torch.tensor([*samples]), fields), unread


def _gather(places: Sequence[tuple[SampleBatch, int]]) -> SampleBatch:
    """A batch of single samples of other batches."""
    samples = [(batch.values[row], batch.labels[row], batch.rows[row]) for batch, row in places]
    fields = {name: [batch.fields[name][row] for batch, row in places] for name in places[0][0].fields}
    values, labels, rows = map(torch.stack, zip(*samples, strict=True))
    return SampleBatch(values, labels, rows, fields)


@contextmanager
def progress(
    total: int | None, title: str, unit: str = "sample", should_stop: Callable[[], bool] = lambda: False
) -> Iterator[Callable[[int], None]]:
    """Inside, call the function with the number of units just done; it raises Interrupted once `should_stop` says so.

    A terminal shows a bar if the work takes long and has a title.
    """
    disable = None if title else True
    with tqdm(total=total, desc=title, unit=unit, delay=BAR_DELAY, leave=False, disable=disable) as bar:

        def advance(num_done: int) -> None:
            bar.update(num_done)
            if should_stop():
                raise Interrupted("the evaluation was asked to stop")

        yield advance


def thumbnails(pictures: Tensor) -> Tensor:
    """uint8 [b, C, T, H, W] -> uint8 [b, C, 32, 32], of clips the middle frame"""
    return F.adaptive_avg_pool2d(pictures[:, :, pictures.shape[2] // 2].float(), THUMBNAIL).round().byte()


def raw_pixels(pictures: Tensor) -> Tensor:
    """uint8 [b, C, T, H, W] -> float32 [b, C * h * w] in [0, 1]: mean over the frames, at most 16 pixels a side"""
    height, width = pictures.shape[-2:]
    share = min(1.0, PIXELS_SIDE / max(height, width))
    size = (max(1, round(height * share)), max(1, round(width * share)))
    mean = pictures.sum(2, dtype=torch.float32) / pictures.shape[2]  # [b, C, H, W]
    return F.adaptive_avg_pool2d(mean / 255, size).flatten(1)


def raw_batch(pictures: Tensor, device: torch.device) -> RawBatch:
    """uint8 [b, C, T, H, W] as the loader would deliver them, without fields."""
    num, size = len(pictures), torch.tensor(pictures.shape[-2:])
    none = torch.empty(0, dtype=torch.long)
    return RawBatch(pictures, size.expand(num, 2), {}, none, none).map(lambda part: part.to(device))
