"""Which samples the probes see, read once: in a fixed order, or shuffled for those who train on them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from jepa.seeding import generator
from jepa.types import Dataset, Field, RawBatch, Sample, fields_of

if TYPE_CHECKING:
    pass


MAX_CACHE_BYTES = 1 << 30
"""of decoded pictures of one part; what is larger is read again at each evaluation"""
MAX_SHOWN_BYTES = 1 << 28
"""of pictures that are kept for the diagnosis whatever the size of the part"""
NUM_DIAGNOSED = 256
THUMBNAIL = 32
PIXELS_SIDE = 16
"""of the images of the raw-pixel baseline: on CIFAR-10 a stronger one than 32 pixels a side, at a tenth of the cost"""
log = logging.getLogger(__name__)


class Reduce(Protocol):
    def pictures(self, images: Sequence[Tensor]) -> Tensor:
        """uint8 [C, T, H, W] of any sizes -> uint8 [b, C, T, H, W]"""
        ...


class ProbeBatch(NamedTuple):
    pictures: Tensor
    """uint8 [b, C, T, H, W]"""
    labels: Tensor
    """long [b]"""
    targets: Tensor
    """float32 [b, Q], Q = 0 where the data set measures nothing"""


class Look(NamedTuple):
    """What is noted of a part's samples, so that they need not be read again for it."""

    pictures: Tensor
    """uint8 [h, C, T, H, W] of the first ones"""
    thumbnails: Tensor
    """uint8 [n, C, 32, 32], of clips the middle frame"""
    pixels: Tensor
    """float32 [n, C * h * w]: mean over the frames, reduced to at most 16 pixels a side, values in [0, 1]"""


class ProbePart:
    """Some samples of a data set, in a fixed order; unreadable ones are left out."""

    def __init__(self, *, dataset: Dataset, indices: Sequence[int], max_cache_bytes: int = MAX_CACHE_BYTES) -> None:
        self.dataset = dataset
        self.indices = tuple(indices)
        self.max_cache_bytes = max_cache_bytes
        self.look: Look | None = None
        self._kept: list[ProbeBatch] | None = None
        self._told = False

    @property
    def seen(self) -> Look:
        """After the first pass."""
        assert self.look is not None
        return self.look

    def batches(self, transform: Reduce, batch_size: int) -> Iterator[ProbeBatch]:
        """At most `batch_size` samples each; always in the same order."""
        if self._kept is not None:
            for kept in self._kept:
                yield from map(ProbeBatch, *(part.split(batch_size) for part in kept))
            return
        kept, num_bytes, num_read = [], 0, 0
        for start in range(0, len(self.indices), batch_size):
            samples = [s for i in self.indices[start : start + batch_size] if (s := self._read(i)) is not None]
            if not samples:
                continue
            batch = _batch_of(samples, transform)
            num_read, num_bytes = num_read + len(samples), num_bytes + batch.pictures.nbytes
            if num_bytes <= self.max_cache_bytes:
                kept.append(batch)
            else:
                kept.clear()
            yield batch
        self._report_broken(num_read)
        self._kept = kept if num_bytes <= self.max_cache_bytes else None

    def shuffled(self, transform: Reduce, batch_size: int, rng: Generator) -> Iterator[ProbeBatch]:
        """All samples in random order, without reading again what is kept."""
        kept = self._kept or ()
        places = [(batch, row) for batch in kept for row in range(len(batch.labels))]
        order = torch.randperm(len(places) or len(self.indices), generator=rng)
        for rows in order.split(batch_size):
            if places:
                chosen = [[part[row] for part in batch] for batch, row in (places[i] for i in rows.tolist())]
                yield ProbeBatch(*(torch.stack(column) for column in zip(*chosen, strict=True)))
            elif samples := [s for i in rows.tolist() if (s := self._read(self.indices[i])) is not None]:
                yield _batch_of(samples, transform)

    def _read(self, index: int) -> tuple[Tensor, int, Tensor] | None:
        try:
            sample = Sample(*self.dataset[index])
            return sample.clip, sample.label, sample.fields.get("quantities", torch.zeros(0))
        except (OSError, RuntimeError) as error:
            if not self._told:
                log.warning("evaluation leaves out %s: %s", self.dataset.describe(index), error)
            return None

    def _report_broken(self, num_read: int) -> None:
        self._told = True
        if num_read == 0:
            raise RuntimeError(
                f"none of the {len(self.indices)} samples of the evaluation could be read, "
                f"the first is {self.dataset.describe(self.indices[0])}"
            )


def _batch_of(samples: Sequence[tuple[Tensor, int, Tensor]], transform: Reduce) -> ProbeBatch:
    clips, labels, targets = zip(*samples, strict=True)
    return ProbeBatch(transform.pictures(clips), torch.tensor(labels), torch.stack(targets))


class ProbeSplit(NamedTuple):
    train: ProbePart
    val: ProbePart
    protocol: str

    @property
    def quantities(self) -> tuple[str, ...]:
        """What both parts measure."""
        train, val = (fields_of(part.dataset).get("quantities", Field()).names for part in (self.train, self.val))
        return train if train == val else ()


def probe_split(dataset: Dataset, *, train_samples: int, val_samples: int, seed: int) -> ProbeSplit:
    """The probe's two parts, drawn uniformly without replacement, labelled samples first: pure in its arguments.

    The validation part comes from `dataset.validation()`, or where there is none from samples of the training set that
    the probe is not fitted on, nor on others of the same `dataset.source(index)`, as of one video.
    """
    if min(train_samples, val_samples) < 1:
        raise ValueError(f"train_samples={train_samples}, val_samples={val_samples}: each must be at least 1")
    if len(dataset) < 2:
        raise ValueError(f"a probe needs at least 2 training samples, the data set has {len(dataset)}")
    order, others = _shuffled(dataset, seed, "probe")
    held_out = dataset.validation()
    if held_out is not None:
        labelled, unlabelled = _shuffled(held_out, seed, "validation")
        val = ProbePart(dataset=held_out, indices=(labelled + unlabelled)[:val_samples])
        source = "of the validation set"
    else:
        num_val = min(val_samples, max(1, len(dataset) // 4))
        num_labelled = min(num_val, max(1, len(order) // 4) if order else 0)
        num_others = min(num_val - num_labelled, len(others))
        val = ProbePart(dataset=dataset, indices=order[:num_labelled] + others[:num_others])
        shown = {_source(dataset, index) for index in val.indices}
        order, others = ([i for i in part if _source(dataset, i) not in shown] for part in (order, others))
        if not order and not others:
            raise ValueError(
                f"the probe has no samples of its own: all are of the {len(shown)} sources of its validation part; "
                f"lower evaluation.val_samples={val_samples}, or give a held-out part"
            )
        source = "held out of the training set (the encoder sees these images, never their labels)"
    train = ProbePart(dataset=dataset, indices=(order + others)[:train_samples])
    protocol = (
        "features: the encoder's output tokens in eval mode, averaged over the sample, no augmentation; "
        f"probes are fitted on {len(train.indices):,} samples of the training set and scored on "
        f"{len(val.indices):,} samples {source}, both drawn at random once (seed {seed}); "
        f"raw pixels are reduced to at most {PIXELS_SIDE} a side"
    )
    return ProbeSplit(train, val, protocol)


def _source(dataset: Dataset, index: int) -> int:
    """What a sample is taken from: samples of one source are no test of each other."""
    source = getattr(dataset, "source", None)
    return index if source is None else source(index)


def _shuffled(dataset: Dataset, seed: int, stream: str) -> tuple[list[int], list[int]]:
    """Indices of the samples that have a label, as far as the data set's `labels` tell, and of the others."""
    order = torch.randperm(len(dataset), generator=generator(seed, 0, 0, stream)).tolist()
    labels = getattr(dataset, "labels", None)
    if labels is None:
        return order, []
    unlabelled = np.asarray(labels) < 0
    return [i for i in order if not unlabelled[i]], [i for i in order if unlabelled[i]]


def look_at(pictures: Tensor, num_seen: int, num_pictures: int) -> Look:
    """uint8 [b, C, T, H, W], after `num_seen` others: of the first samples pictures are kept, as far as memory goes."""
    room = max(num_pictures, min(NUM_DIAGNOSED, MAX_SHOWN_BYTES // pictures[0].nbytes)) - num_seen
    return Look(pictures=pictures[: max(0, room)].clone(), thumbnails=thumbnails(pictures), pixels=raw_pixels(pictures))


def thumbnails(pictures: Tensor) -> Tensor:
    """uint8 [b, C, T, H, W] -> uint8 [b, C, 32, 32], of clips the middle frame"""
    return F.adaptive_avg_pool2d(pictures[:, :, pictures.shape[2] // 2].float(), THUMBNAIL).round().byte()


def raw_pixels(pictures: Tensor) -> Tensor:
    """uint8 [b, C, T, H, W] -> float32 [b, C * h * w]: the baseline of probes, as `Look.pixels`"""
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


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards each submodule is back in the mode it had."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
