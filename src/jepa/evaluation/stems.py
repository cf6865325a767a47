"""Fits the dictionaries of encoders on samples of a data set, before the first step."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from jepa.data.transforms import EvalTransform
from jepa.evaluation.samples import Samples, Split
from jepa.layers.dictionary import DictionaryStem
from jepa.layers.stems import fit_stem
from jepa.seeding import generator
from jepa.types import Dataset

NUM_PICTURES = 4000
"""About as many images, or tubelets of clips, a dictionary is fitted on."""
BATCH_SIZE = 256
"""Pictures that are in memory together."""
log = logging.getLogger(__name__)


def fit_stems(module: nn.Module, dataset: Dataset, transform: EvalTransform, *, seed: int) -> None:
    """Fit the dictionaries that are not fitted yet, all alike: a pure function of the seed and the data set."""
    encoders: list[Any] = [part for part in module.modules() if _needs_fitting(part)]
    if not encoders:
        return
    begun, first = time.perf_counter(), encoders[0]
    order = torch.randperm(len(dataset), generator=generator(seed, 0, 0, "stem samples"))
    indices, unreadable = order[: math.ceil(NUM_PICTURES / first.grid.t)].tolist(), {0: ""}
    while unreadable:  # which samples are taken depends on the number of readable ones
        split = Split(dataset=dataset, name="training", indices=tuple(indices))
        batches = read_clips(split, transform, first.clip_shape[1])
        fit_stem(first, batches, len(indices), generator(seed, 0, 0, "stem"))
        unreadable = split.broken
        indices = [index for index in indices if index not in unreadable]
    for other in encoders[1:]:
        other.stem.load_state_dict(first.stem.state_dict())
        other.embed.load_state_dict(first.embed.state_dict())
    num = len(first.stem.filters)
    log.info("dictionary: %d filters from %s samples in %.1f s", num, f"{len(indices):,}", time.perf_counter() - begun)


def _needs_fitting(part: nn.Module) -> bool:
    return isinstance(stem := getattr(part, "stem", None), DictionaryStem) and not stem.is_fitted


def read_clips(split: Split, transform: EvalTransform, num_frames: int) -> Iterator[Tensor]:
    """Batches of normalised clips, float32 [b, C, T, H, W]; an image among clips is repeated to `num_frames`."""
    reduce, size = _Pictures(transform, num_frames), max(1, BATCH_SIZE // num_frames)
    samples = Samples(split=split, reduce=reduce, batch_size=size, title="fitting the stem")
    return (transform.normalise(batch.values.float()) for batch in samples.batches())


class _Pictures:
    """Runs in a worker."""

    def __init__(self, transform: EvalTransform, num_frames: int) -> None:
        self.transform, self.num_frames = transform, num_frames

    def __call__(self, clips: Sequence[Tensor]) -> Tensor:
        """uint8 [C, T, H, W] of any size -> uint8 [b, C, T, h, w]"""
        pictures = (self.transform.pictures(clip[None]) for clip in clips)
        return torch.cat([p.expand(-1, -1, self.num_frames if p.shape[2] == 1 else -1, -1, -1) for p in pictures])
