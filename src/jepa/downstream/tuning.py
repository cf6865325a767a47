"""What fine-tuning needs of a representation and the two parts: pictures, read once where memory allows."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from math import prod

import torch
from torch import Generator, Tensor

from jepa.data.transforms import Augment
from jepa.distributed import Session
from jepa.downstream.reading import Chunk, Part
from jepa.downstream.representation import Frozen
from jepa.evaluation.features import raw_batch
from jepa.schema import CropConfig
from jepa.types import Tuning

MAX_KEPT_BYTES = 1 << 31
"""of the pictures of one part; more are read again in each epoch"""


class Pictures:
    """A part as the encoder sees it before normalising: uint8 [n, C, T, h, w]."""

    def __init__(self, part: Part, representation: Frozen, batch_size: int) -> None:
        channels, height, width = representation.encoder.clip_shape[0], *representation.transform.image_size
        frames = getattr(part.dataset, "num_frames", 1)
        self.part, self.reduce, self.batch_size = part, representation.reduce, max(1, batch_size // frames)
        self.is_kept = len(part.indices) * prod((channels, frames, height, width)) <= MAX_KEPT_BYTES
        self.rows = torch.empty(0, dtype=torch.long)
        """places in the part of the samples that could be read, after a first pass in order"""
        self._kept: list[Chunk] = []

    def in_order(self) -> Iterator[Chunk]:
        if self._kept:
            yield from self._kept
            return
        chunks, rows = [], []
        for chunk in self.part.watched(self.reduce, self.batch_size, "reading"):
            rows.append(chunk.rows)
            chunks += [chunk] if self.is_kept else []
            yield chunk
        self._kept, self.rows = chunks, torch.cat(rows)

    def shuffled(self, batch_size: int, rng: Generator) -> Iterator[Chunk]:
        if not self.is_kept:
            order = torch.randperm(len(self.part.indices), generator=rng)
            yield from self.part.read(self.reduce, batch_size, order)
            return
        if not self._kept:
            list(self.in_order())
        places = [(chunk, row) for chunk in self._kept for row in range(len(chunk.rows))]
        for some in torch.randperm(len(places), generator=rng).split(batch_size):
            columns = zip(
                *([part[row] for part in chunk] for chunk, row in (places[i] for i in some.tolist())), strict=True
            )
            yield Chunk(*(torch.stack(column) for column in columns))


def tuning_of(
    representation: Frozen, train: Pictures, test: Pictures, crops: CropConfig, session: Session, seed: int
) -> Tuning:
    """Crops are those of `crops`, of the pictures that probes see."""
    normalise, size = representation.transform.normalise, representation.transform.image_size
    augment = Augment(
        image_size=size, mean=normalise.mean, std=normalise.std, flip=crops.flip,
        crop_scale=(crops.crop_scale[0], crops.crop_scale[1]), crop_aspect=(crops.crop_aspect[0], crops.crop_aspect[1]),
    )  # fmt: skip
    return Tuning(
        backbone=representation.encoder, device=session.device, seed=seed, autocast=session.autocast,
        train=partial(_augmented, augment, train, session), val=partial(_plain, representation, test, session),
        should_stop=lambda: False, num_train=len(train.part.indices),
    )  # fmt: skip


def _augmented(
    augment: Augment, train: Pictures, session: Session, batch_size: int, rng: Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    for chunk in train.shuffled(batch_size, rng):
        yield augment(raw_batch(chunk.values, session.device), rng).clips, chunk.labels.to(session.device)


def _plain(representation: Frozen, test: Pictures, session: Session) -> Iterator[Tensor]:
    for chunk in test.in_order():
        yield representation.transform.normalise(chunk.values.to(session.device).float())
