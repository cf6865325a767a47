"""Choice of the frames of a clip: pure functions of the video's length and a relative start in [0, 1)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from jepa.seeding import derive_seed

SHORT = {"skip": "leaves them out", "hold": "repeats the last frame", "loop": "begins again at the first frame"}
"""Treatments of a video that is shorter than a clip, with their description in the warning."""


def random_start(index: int, seed: int) -> float:
    """A relative start in [0, 1), a pure function of both arguments."""
    return derive_seed(seed, index, 0, "clip") / 2**63


def even_start(number: int, count: int) -> float:
    """The middle of part `number` of `count` equal parts of [0, 1); a single clip is the central one."""
    return (number + 0.5) / count


def num_start_positions(length: int, num_frames: int, step: float) -> int:
    """Number of frames at which a clip of frames `step` apart can start; 0 or less if the video is too short."""
    return math.floor(length - 1 - (num_frames - 1) * step + 1e-6) + 1


def frame_positions(length: int, num_frames: int, step: float, start: float, short: str) -> list[float]:
    """Frame numbers of a clip, counted from 0: integers below `length` if `step` is an integer.

    Raises OSError for a video that is shorter than the clip with short="skip".
    """
    num_starts = num_start_positions(length, num_frames, step)
    first = math.floor(start * max(0, num_starts))
    positions = [first + number * step for number in range(num_frames)]
    if num_starts > 0:
        return positions
    if short == "skip":
        raise OSError(f"{length} frames are shorter than a clip (dataset.short=skip)")
    return [min(position, length - 1) if short == "hold" else position % length for position in positions]


def to_grey(frames: Tensor) -> Tensor:
    """uint8 [T, 3, H, W] -> [T, 1, H, W], with the weights of ITU-R BT.601"""
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    return (frames * weights).sum(dim=1, keepdim=True).round_().to(torch.uint8)


def short_videos_warning(num_short: int, num_checked: int, total: int, clip: str, short: str) -> str:
    of = f"{total} videos" if num_checked == total else f"{num_checked} checked videos (of {total})"
    return f"{num_short} of {of} are shorter than a clip of {clip}; short={short} {SHORT[short]}"
