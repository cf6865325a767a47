"""Several data sets in one run, each with its share of the samples."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jepa.data.loader import InfiniteOrder
from jepa.seeding import derive_seed, generator
from jepa.types import ClipDataset, Dataset, DatasetTraits, Sample

BLOCK = 1000
"""samples in which the shares are exact, to the nearest sample"""
BATCH_BLOCK = 100
"""the same in batches, where whole batches are dealt out"""


class Mixture:
    """The parts' samples one after the other, dealt out by `weights`; parts are built by their factories.

    What is at a position of the endless stream is arithmetic: within a block the shares are exact and the order is
    drawn, and each part has endless permutations of its own. Parts that deliver different numbers of frames never
    share a batch: of them whole batches are dealt out. Classes, pixel statistics and the held-out part are those of
    the part `probe` (None: the first); samples of other parts count as unlabelled.
    """

    def __init__(
        self,
        *,
        num_frames: int,
        parts: Mapping[str, Callable[..., Dataset]],
        weights: Mapping[str, float],
        probe: str | None = None,
    ) -> None:
        if not parts or set(parts) != set(weights) or min(weights.values()) <= 0:
            raise ValueError(f"dataset.weights={dict(weights)}: expected one above 0 for each of {', '.join(parts)}")
        probe = next(iter(parts)) if probe is None else probe
        if probe not in parts:
            raise ValueError(f"dataset.probe={probe}: expected one of {', '.join(parts)}")
        self.num_frames = num_frames
        self.part_names = tuple(parts)
        self.parts = [_build(parts[name], num_frames) for name in parts]
        self.shares = [weights[name] / sum(weights.values()) for name in parts]
        self.probed = self.parts[self.part_names.index(probe)]
        self.classes, self.channels = self.probed.classes, self.probed.channels
        self.mean, self.std = self.probed.mean, self.probed.std
        channels = {name: part.channels for name, part in zip(self.part_names, self.parts, strict=True)}
        if len(set(channels.values())) > 1:
            raise ValueError(f"dataset.parts: all must have the same channels, got {channels}")
        self.starts = list(accumulate((len(part) for part in self.parts), initial=0))
        self.in_memory = all(DatasetTraits.of(part).in_memory for part in self.parts)

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """uint8 [C, T, H, W] with the T of its part, and its label"""
        part, own = self._find(index)
        return self._labelled(part, Sample(*part[own]))

    def draw(self, index: int, seed: int) -> tuple[Tensor, int]:
        part, own = self._find(index)
        return self._labelled(part, Sample(*(part.draw(own, seed) if isinstance(part, ClipDataset) else part[own])))

    def describe(self, index: int) -> str:
        part, own = self._find(index)
        return part.describe(own)

    def validation(self) -> Dataset | None:
        return self.probed.validation()

    def part_of(self, index: int) -> tuple[int, range]:
        """The number of the part that an index belongs to, and that part's indices."""
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        return number, range(self.starts[number], self.starts[number + 1])

    def index_order(self, batch_size: int, seed: int) -> Callable[[int], tuple[int, int]]:
        """Position -> index and epoch of the part; `batch_size` is that of a step, over all ranks."""
        frames = {part.num_frames if isinstance(part, ClipDataset) else 1 for part in self.parts}
        if len(frames) == 1:
            return MixtureOrder(self, seed, block=BLOCK, run=1).take
        smallest = min(map(len, self.parts))
        if smallest < batch_size:
            reason = "whole batches are of one part, since the parts have different numbers of frames"
            raise ValueError(f"batch_size={batch_size}: a part of the mixture has only {smallest} samples; {reason}")
        return MixtureOrder(self, seed, block=BATCH_BLOCK, run=batch_size).take

    def _find(self, index: int) -> tuple[Dataset, int]:
        number, indices = self.part_of(index)
        return self.parts[number], index - indices.start

    def _labelled(self, part: Dataset, sample: Sample) -> tuple[Tensor, int]:
        return sample.clip, sample.label if part is self.probed else -1


class MixtureOrder:
    """Deals out runs of `run` positions: of `block` of them each part has its exact share, in a drawn order."""

    def __init__(self, mixture: Mixture, seed: int, block: int, run: int) -> None:
        self.mixture, self.seed, self.run = mixture, seed, run
        self.counts = largest_remainder(mixture.shares, block)
        parts = zip(mixture.part_names, mixture.parts, strict=True)
        self.streams = [_stream(part, seed, f"order of {name}") for name, part in parts]
        self._block, self._order, self._ranks = -1, np.empty(0, np.int64), np.empty(0, np.int64)

    def take(self, position: int) -> tuple[int, int]:
        turn, offset = divmod(position, self.run)
        block, slot = divmod(turn, sum(self.counts))
        if block != self._block:
            self._shuffle(block)
        part = int(self._order[slot])
        earlier = block * self.counts[part] + int(self._ranks[slot])  # runs of this part before this one
        own, epoch = self.streams[part](earlier * self.run + offset)
        return self.mixture.starts[part] + own, epoch

    def _shuffle(self, block: int) -> None:
        """Which part has each slot, and how many slots of this block it has had before."""
        random = generator(self.seed, block, 0, "mixture")
        sorted_parts = np.repeat(np.arange(len(self.counts)), self.counts)
        self._order = sorted_parts[torch.randperm(len(sorted_parts), generator=random).numpy()]
        self._ranks = np.empty_like(self._order)
        for part, number in enumerate(self.counts):
            self._ranks[self._order == part] = np.arange(number)
        self._block = block


def _stream(part: Any, seed: int, stream: str) -> Callable[[int], tuple[int, int]]:
    """Position of the part's own samples -> index and epoch; a part that can deal does."""
    if deal := DatasetTraits.of(part).index_order:
        return deal(1, derive_seed(seed, 0, 0, stream))
    return InfiniteOrder(len(part), seed, stream).take


def largest_remainder(shares: list[float], total: int) -> list[int]:
    """Whole numbers that add up to `total`, each within one of its share; every part has at least one."""
    counts = [int(share * total) for share in shares]
    by_rest = sorted(range(len(shares)), key=lambda part: counts[part] - shares[part] * total)
    for part in by_rest[: total - sum(counts)]:
        counts[part] += 1
    if min(counts) < 1:
        raise ValueError(f"dataset.weights: a share of {min(shares):.2g} is less than one of {total}; raise it")
    return counts


class MixtureCounter:
    """Counts which parts the samples of a run are of, between two readings."""

    def __init__(self, dataset: Any) -> None:
        self.names = DatasetTraits.of(dataset).part_names
        self.counts = torch.zeros(len(self.names))

    def note(self, parts: Tensor) -> None:
        """long [B] on the CPU"""
        if self.names:
            self.counts += torch.bincount(parts, minlength=len(self.names))

    def read(self) -> dict[str, float]:
        """data/share_NAME of each part; nothing where the data are no mixture."""
        shares = (self.counts / self.counts.sum().clamp(min=1)).tolist()
        self.counts.zero_()
        return {f"data/share_{name}": share for name, share in zip(self.names, shares, strict=True)}


def _build(build: Callable[..., Dataset], num_frames: int) -> Dataset:
    takes_frames = "num_frames" in inspect.signature(build).parameters
    return (partial(build, num_frames=num_frames) if takes_frames else build)()
