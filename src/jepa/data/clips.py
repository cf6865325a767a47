"""Which frames of a video make a clip: pure functions of the video's length and of a place in [0, 1)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from jepa.seeding import derive_seed

SHORT = {
    "skip": "leaves them out",
    "hold": "repeats the last frame",
    "loop": "begins again at the first frame",
}
"""what is done with a video that is shorter than a clip"""


def random_start(index: int, seed: int) -> float:
    """In [0, 1), a pure function of both."""
    return derive_seed(seed, index, 0, "clip") / 2**63


def even_start(number: int, count: int) -> float:
    """The middle of part `number` of `count` equal parts of [0, 1); of one clip the centre."""
    return (number + 0.5) / count


def spare(length: int, num_frames: int, step: float) -> int:
    """How many other places a clip of frames that are `step` apart has in a video; negative where it has none."""
    return math.floor(length - 1 - (num_frames - 1) * step + 1e-6)


def frame_positions(length: int, num_frames: int, step: float, place: float, short: str) -> list[float]:
    """In frames from the first: whole numbers below `length` where `step` is one.

    Raises OSError for a video that is shorter than the clip and is to be skipped.
    """
    room = spare(length, num_frames, step)
    first = math.floor(place * (room + 1)) if room >= 0 else 0
    found = [first + number * step for number in range(num_frames)]
    if room >= 0:
        return found
    if short == "skip":
        raise OSError(f"{length} frames are shorter than a clip (dataset.short=skip)")
    return [min(position, length - 1) if short == "hold" else position % length for position in found]


def to_grey(frames: Tensor) -> Tensor:
    """uint8 [T, 3, H, W] -> [T, 1, H, W], by the weights of ITU-R BT.601"""
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    return (frames * weights).sum(dim=1, keepdim=True).round_().to(torch.uint8)


def how_many_are_short(num_short: int, looked_at: int, total: int, clip: str, short: str) -> str:
    of = f"{total} videos" if looked_at == total else f"{looked_at} of all {total} videos that were looked at"
    return f"{num_short} of {of} are shorter than a clip of {clip}; short={short} {SHORT[short]}"
