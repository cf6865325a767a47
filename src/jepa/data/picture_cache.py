"""Decoded pictures in memory that all data workers of a process share, so that each is decoded once."""

from __future__ import annotations

import logging
import mmap
import multiprocessing
from collections.abc import Callable, Sequence

import torch

from jepa.parallel.device import free_memory
from jepa.types import Sample

log = logging.getLogger(__name__)
SHARE = 0.25
"""Largest share of the free memory that `auto` takes."""
NUM_PROBED = 16
"""Samples whose size is measured beforehand."""
MARGIN = 1.25
"""Memory that is reserved, over what the measured samples would need; it is only taken as it is filled."""
COLUMNS = 6
"""Of a row of the table: position + 1 of the pixels in bytes, channels, frames, height, width, label."""
GIB = 2**30


class PictureCache:
    """A picture [C, T, H, W] and its label by index. A picture that does not fit any more is not kept.

    Processes share it if they are forked from the one that makes it.
    """

    def __init__(self, num_samples: int, num_bytes: int) -> None:
        self._pixels = torch.frombuffer(mmap.mmap(-1, max(1, num_bytes)), dtype=torch.uint8)
        table = torch.frombuffer(mmap.mmap(-1, num_samples * COLUMNS * 8), dtype=torch.long)
        self._rows = table.unflatten(0, (num_samples, COLUMNS))
        self._used = multiprocessing.get_context("fork").Value("q", 0)

    def get(self, index: int) -> Sample | None:
        with self._used.get_lock():  # so that pixels are seen that were written before the row
            position, channels, frames, height, width, label = self._rows[index].tolist()
        if not position:
            return None
        shape = frames, height, width, channels
        pixels = self._pixels[position - 1 :][: channels * frames * height * width].unflatten(0, shape)
        return Sample(pixels.permute(3, 0, 1, 2), label)

    def put(self, index: int, sample: Sample) -> None:
        size = sample.clip.numel()
        with self._used.get_lock():
            start = self._used.value
            if self._rows[index, 0] or start + size > len(self._pixels):
                return
            self._used.value = start + size
        channels_last = sample.clip.permute(1, 2, 3, 0)
        self._pixels[start : start + size].unflatten(0, channels_last.shape).copy_(channels_last)
        with self._used.get_lock():
            self._rows[index] = torch.tensor([start + 1, *sample.clip.shape, int(sample.label)])


def make_cache(
    keep: bool | str, num_samples: int, read: Callable[[int], Sample | None], *, processes: int = 1
) -> PictureCache | None:
    """A cache for all samples, if that is wanted and, with `auto`, takes at most a quarter of the free memory.

    `read` gives a sample as it will be kept, None if it cannot be read. `processes` of this machine make a cache each.
    """
    if not keep or multiprocessing.get_context().get_start_method() != "fork":
        return None
    samples = map(read, range(0, num_samples, max(1, num_samples // NUM_PROBED)))
    sizes = [sample.clip.numel() for sample in samples if sample is not None]
    needed, free = _needed(sizes, num_samples), free_memory()
    fits = sizes and needed * processes <= SHARE * free
    if keep == "auto" and not fits:
        return None
    log.info(
        "pictures are decoded once and kept in memory: about %.2f GiB of %.1f that are free (keep_decoded=false reads "
        "them anew)", needed * processes / MARGIN / GIB, free / GIB,
    )  # fmt: skip
    return PictureCache(num_samples, needed)


def _needed(sizes: Sequence[int], num_samples: int) -> int:
    return int(MARGIN * num_samples * sum(sizes) / max(1, len(sizes)))
