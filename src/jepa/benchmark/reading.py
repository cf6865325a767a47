"""The two labelled parts of a data set that representations are judged on, read in order by workers."""

from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from tqdm import tqdm

from jepa.data.loader import UNREADABLE, choose_num_workers, first_line, read_in_order
from jepa.errors import ConfigError, RunError
from jepa.evaluation.samples import probe_split
from jepa.types import Dataset, Sample

SILENT_SECONDS = 5
"""what takes longer shows a bar on a terminal"""
log = logging.getLogger(__name__)
Reduce = Callable[[Sequence[Tensor]], Tensor]
"""uint8 [C, T, H, W] of any sizes -> [b, ...], made in a worker"""


class Chunk(NamedTuple):
    values: Tensor
    """[b, ...]"""
    labels: Tensor
    """long [b]"""
    rows: Tensor
    """long [b]: places in the part; what cannot be read is left out"""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Samples of a data set in a fixed order."""

    dataset: Dataset
    name: str
    """training or test, for a bar"""
    indices: tuple[int, ...]
    labels: Tensor
    """long [n], at least 0"""
    num_workers: int
    broken: dict[int, str] = field(default_factory=dict)
    """index of each sample that could not be read, with the reason; grows as the part is read"""

    @cached_property
    def digest(self) -> str:
        """Of which samples these are and how they are labelled; of what files hold it knows nothing."""
        told = hashlib.sha256(repr(self.labels.tolist()).encode())
        for index in self.indices:
            told.update(f"{index} {self.dataset.describe(index)}\n".encode(errors="surrogateescape"))
        return told.hexdigest()[:16]

    @property
    def num_sources(self) -> int:
        """Of what the samples are taken from: clips of one video are no independent test."""
        source = getattr(self.dataset, "source", None)
        return len(self.indices) if source is None else len({source(index) for index in self.indices})

    def take(self, rows: Tensor) -> Part:
        chosen = tuple(self.indices[row] for row in rows.tolist())
        return replace(self, indices=chosen, labels=self.labels[rows])

    def read(self, reduce: Reduce, batch_size: int, order: Tensor | None = None) -> Iterator[Chunk]:
        """At most `batch_size` samples each, in the order of the part, or of `order`, places in it."""
        order = torch.arange(len(self.indices)) if order is None else order
        reader = _Reader(self.dataset, self.indices, reduce)
        lists, num_read = [rows.tolist() for rows in order.split(batch_size)], 0
        with closing(read_in_order(reader, lists, self.num_workers)) as stream:
            for rows, (values, labels, unread) in zip(lists, stream, strict=True):
                self._note(unread)
                kept = [row for row in rows if row not in unread]
                num_read += len(kept)
                if kept:
                    yield Chunk(values, torch.tensor(labels), torch.tensor(kept))
        if num_read == 0:
            index, reason = next((index, self.broken[index]) for index in self.indices)
            raise RunError(f"no {self.name} sample can be read; the first: {self.dataset.describe(index)}: {reason}")

    def watched(self, reduce: Reduce, batch_size: int, doing: str) -> Iterator[Chunk]:
        """The same with a bar on a terminal."""
        total, title = len(self.indices), f"{doing} ({self.name})"
        with tqdm(total=total, desc=title, unit="sample", delay=SILENT_SECONDS, leave=False, disable=None) as bar:
            for chunk in self.read(reduce, batch_size):
                yield chunk
                bar.update(len(chunk.rows))

    def _note(self, unread: dict[int, str]) -> None:
        for row, reason in unread.items():
            index = self.indices[row]
            if index not in self.broken:
                log.warning("left out %s: %s", self.dataset.describe(index), reason)
            self.broken[index] = reason


class _Reader(TorchDataset):
    """What runs in a worker: places -> values, labels, and the reasons of those that cannot be read."""

    def __init__(self, dataset: Dataset, indices: Sequence[int], reduce: Reduce) -> None:
        self.dataset, self.indices, self.reduce = dataset, indices, reduce

    def __getitem__(self, rows: list[int]) -> tuple[Any, list[int], dict[int, str]]:
        clips, labels, unread = [], [], {}
        for row in rows:
            try:
                clip, label, _ = Sample(*self.dataset[self.indices[row]])
            except UNREADABLE as fault:
                unread[row] = first_line(fault)
                continue
            clips.append(clip)
            labels.append(label)
        return (self.reduce(clips) if clips else None), labels, unread


class Parts(NamedTuple):
    train: Part
    test: Part
    classes: tuple[str, ...]
    told: str
    """in one sentence: what they are"""
    warnings: tuple[str, ...]


def split(
    dataset: Dataset, *, train_samples: int | None, test_samples: int | None, seed: int, num_workers: int | None
) -> Parts:
    """Training samples are the data set's, test samples those of its held-out part, or held out here without one.

    Raises ConfigError where there are no labels to judge by.
    """
    dataset = getattr(dataset, "probed", dataset)
    drawn = probe_split(
        dataset, train_samples=train_samples or len(dataset), val_samples=test_samples or sys.maxsize, seed=seed
    )
    workers = choose_num_workers(dataset) if num_workers is None else num_workers
    parts, unlabelled = [], 0
    for name, source in (("training", drawn.train), ("test", drawn.val)):
        part = _labelled(source.dataset, sorted(source.indices), name, workers)
        unlabelled += len(source.indices) - len(part.indices)
        if not part.indices:
            raise ConfigError([f"dataset: no {name} sample has a label, and all tasks of jepa-eval need them"])
        parts.append(part)
    train, test = parts
    if len(train.labels.unique()) < 2:
        raise ConfigError([f"dataset: all {len(train.labels)} labelled training samples are of one class"])
    own = dataset.validation() is not None
    limits = [f"{n:,} drawn at random (seed {seed})" for n in (train_samples, test_samples) if n] or ["all"]
    told = (
        f"{len(train.indices):,} training samples; {len(test.indices):,} test samples "
        + ("of the held-out part" if own else f"held out of the training set (seed {seed}), a quarter of it at most")
        + (f", limited: {'; '.join(limits)}" if train_samples or test_samples else "")
        + (f"; {unlabelled:,} without a label are left out" if unlabelled else "")
    )
    return Parts(train, test, _names(dataset.classes, parts), told, tuple(_warnings(dataset.classes, train, test)))


def _labelled(dataset: Dataset, indices: list[int], name: str, num_workers: int) -> Part:
    """The samples that have a label; where the data set does not list its labels, all are read for them."""
    labels = getattr(dataset, "labels", None)
    part = Part(
        dataset=dataset, name=name, indices=tuple(indices), num_workers=num_workers,
        labels=torch.full((len(indices),), -1) if labels is None else torch.as_tensor(np.asarray(labels)[indices]),
    )  # fmt: skip
    if labels is None:
        for chunk in part.watched(_nothing, 256, "reading labels"):
            part.labels[chunk.rows] = chunk.labels
    return part.take((part.labels >= 0).nonzero()[:, 0])


def _nothing(clips: Sequence[Tensor]) -> Tensor:
    return torch.empty(len(clips), 0)


def _names(classes: Sequence[str], parts: Sequence[Part]) -> tuple[str, ...]:
    most = max(int(part.labels.max()) for part in parts) + 1
    return (*classes, *(str(label) for label in range(len(classes), most)))


def _warnings(classes: Sequence[str], train: Part, test: Part) -> Iterator[str]:
    names = _names(classes, [train, test])
    both = [{names[label] for label in part.labels.unique().tolist()} for part in (train, test)]
    missing = {"training": both[1] - both[0], "test": both[0] - both[1]}
    if lacking := sorted(missing["training"]):
        count = sum(int((test.labels == names.index(name)).sum()) for name in lacking)
        yield f"no training sample of {_listed(lacking)}: its {count:,} test samples count as wrong"
    if lacking := sorted(missing["test"]):
        yield f"no test sample of {_listed(lacking)}: nothing is known of how well it is told"


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(f'"{name}"' for name in names[:8])
    return f"class {shown}" + (f" and {len(names) - 8} more" if len(names) > 8 else "")
