"""Several data sets in one run, each with its share of the samples."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jepa.data.identity import content_of
from jepa.data.loader import Order, infinite_order
from jepa.seeding import derive_seed, generator
from jepa.types import ClipDataset, Dataset, DatasetTraits, Sample

BLOCK = 1000
"""Samples among which the shares are exact, to the nearest sample."""
BATCH_BLOCK = 100
"""Batches among which the shares are exact, if the parts do not share batches."""


class Mixture:
    """The parts' samples one after the other, drawn in proportion to `weights`; each part is built by its factory.

    The sample at a position of the endless order is computed directly: in each block the shares are exact and the
    order of the parts is random, and each part has its own endless order. Parts with different numbers of frames never
    share a batch: each batch is of one part. Classes, pixel statistics and the held-out part are those of the part
    `probe` (None: the first part); samples of other parts have the label -1.
    """

    def __init__(
        self, *, num_frames: int, parts: Mapping[str, Callable[..., Dataset]], weights: Mapping[str, float],
        probe: str | None = None,
    ) -> None:  # fmt: skip
        if not parts or set(parts) != set(weights) or min(weights.values()) <= 0:
            raise ValueError(f"dataset.weights={dict(weights)}: expected one above 0 for each of {', '.join(parts)}")
        probe = next(iter(parts)) if probe is None else probe
        if probe not in parts:
            raise ValueError(f"dataset.probe={probe}: expected one of {', '.join(parts)}")
        self.num_frames = num_frames
        self.part_names = tuple(parts)
        self.parts = [_build(parts[name], num_frames) for name in parts]
        self.shares = [weights[name] / sum(weights.values()) for name in parts]
        self.probe_dataset = self.parts[self.part_names.index(probe)]
        self.classes, self.channels = self.probe_dataset.classes, self.probe_dataset.channels
        self.mean, self.std = self.probe_dataset.mean, self.probe_dataset.std
        channels = {name: part.channels for name, part in zip(self.part_names, self.parts, strict=True)}
        if len(set(channels.values())) > 1:
            raise ValueError(f"dataset.parts: all must have the same channels, got {channels}")
        self.starts = list(accumulate((len(part) for part in self.parts), initial=0))
        self.in_memory = all(DatasetTraits.of(part).in_memory for part in self.parts)

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """uint8 [C, T, H, W] with the T of its part, and its label"""
        part, part_index = self._locate(index)
        return self._labelled(part, part[part_index])

    def draw(self, index: int, seed: int) -> tuple[Tensor, int]:
        part, part_index = self._locate(index)
        return self._labelled(part, part.draw(part_index, seed) if isinstance(part, ClipDataset) else part[part_index])

    def describe(self, index: int) -> str:
        part, part_index = self._locate(index)
        return part.describe(part_index)

    def validation(self) -> Dataset | None:
        return self.probe_dataset.validation()

    def encoded(self, index: int) -> bytes:
        number, indices = self.part_of(index)
        return content_of(self.parts[number], index - indices.start)

    def prepare(self, indices: Sequence[int]) -> None:
        for part, start in zip(self.parts, self.starts[:-1], strict=True):
            DatasetTraits.of(part).prepare([index - start for index in indices if start <= index < start + len(part)])

    def part_of(self, index: int) -> tuple[int, range]:
        """The number of the part that an index belongs to, and that part's indices."""
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        return number, range(self.starts[number], self.starts[number + 1])

    def index_order(self, batch_size: int, seed: int) -> Order:
        """Position -> index, and epoch of its part; `batch_size` is that of a step, over all ranks."""
        frames = {part.num_frames if isinstance(part, ClipDataset) else 1 for part in self.parts}
        if len(frames) == 1:
            return mixture_order(self, seed, block=BLOCK, run=1)
        smallest = min(map(len, self.parts))
        if smallest < batch_size:
            reason = "whole batches are of one part, since the parts have different numbers of frames"
            raise ValueError(f"batch_size={batch_size}: a part of the mixture has only {smallest} samples; {reason}")
        return mixture_order(self, seed, block=BATCH_BLOCK, run=batch_size)

    def _locate(self, index: int) -> tuple[Dataset, int]:
        number, indices = self.part_of(index)
        return self.parts[number], index - indices.start

    def _labelled(self, part: Dataset, sample: tuple[Any, ...]) -> tuple[Tensor, int]:
        clip, label, _ = Sample(*sample)
        return clip, label if part is self.probe_dataset else -1


def mixture_order(mixture: Mixture, seed: int, block: int, run: int) -> Order:
    """Runs of `run` samples of one part; among each `block` runs the shares are exact and the order is random."""
    counts = largest_remainder(mixture.shares, block)
    parts = zip(mixture.part_names, mixture.parts, strict=True)
    orders = [_part_order(part, seed, f"order of {name}") for name, part in parts]

    @lru_cache(maxsize=1)
    def runs_of_block(number: int) -> tuple[np.ndarray, np.ndarray]:
        """The part of each run [block], and its rank among the runs of that part [block]."""
        random = generator(seed, number, 0, "mixture")
        run_parts = np.repeat(np.arange(len(counts)), counts)[torch.randperm(block, generator=random).numpy()]
        ranks = np.empty_like(run_parts)
        for part, count in enumerate(counts):
            ranks[run_parts == part] = np.arange(count)
        return run_parts, ranks

    def at(position: int) -> tuple[int, int]:
        run_number, offset = divmod(position, run)
        block_number, slot = divmod(run_number, block)
        run_parts, ranks = runs_of_block(block_number)
        part = int(run_parts[slot])
        earlier_runs = block_number * counts[part] + int(ranks[slot])  # of this part
        index, epoch = orders[part](earlier_runs * run + offset)
        return mixture.starts[part] + index, epoch

    return at


def _part_order(part: Any, seed: int, stream: str) -> Order:
    if index_order := DatasetTraits.of(part).index_order:
        return index_order(1, derive_seed(seed, 0, 0, stream))
    return infinite_order(len(part), seed, stream)


def largest_remainder(shares: list[float], total: int) -> list[int]:
    """Integers that add up to `total`, each within one of its share; raises ValueError if a part would get none."""
    counts = [int(share * total) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda part: counts[part] - shares[part] * total)
    for part in by_remainder[: total - sum(counts)]:
        counts[part] += 1
    if min(counts) < 1:
        raise ValueError(f"dataset.weights: a share of {min(shares):.2g} is less than one of {total}; raise it")
    return counts


class MixtureCounter:
    """Counts the samples of each part between two readings."""

    def __init__(self, dataset: Any) -> None:
        self.names = DatasetTraits.of(dataset).part_names
        self.counts = torch.zeros(len(self.names))

    def add(self, parts: Tensor) -> None:
        """long [B] on the CPU"""
        if self.names:
            self.counts += torch.bincount(parts, minlength=len(self.names))

    def read(self) -> dict[str, float]:
        """data/share_NAME of each part since the last call; empty if the data set is no mixture."""
        shares = (self.counts / self.counts.sum().clamp(min=1)).tolist()
        self.counts.zero_()
        return {f"data/share_{name}": share for name, share in zip(self.names, shares, strict=True)}


def _build(factory: Callable[..., Dataset], num_frames: int) -> Dataset:
    takes_frames = "num_frames" in inspect.signature(factory).parameters
    return (partial(factory, num_frames=num_frames) if takes_frames else factory)()
