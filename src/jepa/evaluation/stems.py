"""Fits the dictionaries of encoders on samples of a data set, before the first step."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
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
"""Images, or tubelets of clips, that a dictionary is fitted on."""
BATCH_SIZE = 256
log = logging.getLogger(__name__)


def fit_stems(module: nn.Module, dataset: Dataset, transform: EvalTransform, *, seed: int) -> None:
    """Fit the dictionaries that are not fitted yet, all alike: a pure function of the seed and the data set."""
    encoders: list[Any] = [part for part in module.modules() if _needs_fitting(part)]
    if not encoders:
        return
    begun, first = time.perf_counter(), encoders[0]
    clips = draw_clips(dataset, transform, first.clip_shape[1], first.grid.t, seed=seed)
    fit_stem(first, clips, generator(seed, 0, 0, "stem"))
    for other in encoders[1:]:
        other.stem.load_state_dict(first.stem.state_dict())
        other.embed.load_state_dict(first.embed.state_dict())
    num = len(first.stem.filters)
    log.info("dictionary: %d filters from %s samples in %.1f s", num, f"{len(clips):,}", time.perf_counter() - begun)


def _needs_fitting(part: nn.Module) -> bool:
    return isinstance(stem := getattr(part, "stem", None), DictionaryStem) and not stem.is_fitted


def draw_clips(dataset: Dataset, transform: EvalTransform, num_frames: int, num_steps: int, *, seed: int) -> Tensor:
    """Normalised float32 [n, C, T, H, W]: random samples with about NUM_PICTURES images or tubelets of `num_steps`.

    An image among clips is repeated to `num_frames`.
    """
    order = torch.randperm(len(dataset), generator=generator(seed, 0, 0, "stem samples"))
    chosen = order[: math.ceil(NUM_PICTURES / num_steps)]
    split = Split(dataset=dataset, name="training", indices=tuple(chosen.tolist()))
    samples = Samples(
        split=split, reduce=_Pictures(transform, num_frames), batch_size=BATCH_SIZE, title="fitting the stem"
    )
    return transform.normalise(torch.cat([batch.values for batch in samples.batches()]).float())


class _Pictures:
    """Runs in a worker."""

    def __init__(self, transform: EvalTransform, num_frames: int) -> None:
        self.transform, self.num_frames = transform, num_frames

    def __call__(self, clips: Sequence[Tensor]) -> Tensor:
        """uint8 [C, T, H, W] of any size -> uint8 [b, C, T, h, w]"""
        pictures = (self.transform.pictures(clip[None]) for clip in clips)
        return torch.cat([p.expand(-1, -1, self.num_frames if p.shape[2] == 1 else -1, -1, -1) for p in pictures])
