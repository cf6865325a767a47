"""Clips of two bouncing digits, drawn on the fly: labels, positions and velocities are known exactly."""

from __future__ import annotations

from math import ceil, cos, pi, sin
from typing import Annotated, NamedTuple

import numpy as np
import torch

from jepa.data.embedded import SyntheticDataset
from jepa.types import Field, PositiveInt, Sample, Seed, Within

HEIGHT = (0.32, 0.42)
"""Height of an upright digit, in picture sides."""
WIDTH_RATIO = (0.8, 1.1)
"""Width of a digit relative to `STROKES`."""
MAX_SLANT = 0.3
"""Largest shift to either side per unit of height."""
STROKE = (0.05, 0.09)
"""Half the width of a stroke, in heights of the digit."""
WARM = ((215, 255), (60, 165), (0, 45))
"""Bounds of red, green and blue of the first digit."""
COOL = ((0, 45), (75, 195), (215, 255))
"""Bounds of red, green and blue of the second digit."""
PAD = 3
"""Margin around the picture, in pixels, for the smooth edge of a digit at the wall."""
Bounds = tuple[float, float]


class Glyph(NamedTuple):
    """A digit as drawn in one clip."""

    field: np.ndarray
    """float32 [h + 1, w + 1]: signed distance to the edge of the stroke in pixels, sampled at the pixels' corners"""
    free: np.ndarray
    """float [2]: range of its centre in x and y, in picture sides"""
    colour: np.ndarray
    """[3], 0 to 255"""


class MovingDigits(SyntheticDataset):
    """Clips of a warm and a cool digit that move straight and bounce off the walls; the warm digit is the label.

    The look of both digits depends on (seed, index) alone, and so do start and velocity in `self[index]`; `draw` takes
    the same digits with another start and velocity. Positions are continuous and edges smooth; where the digits
    overlap, the larger value of a channel wins. `speed` is in picture sides per frame: with the default a digit covers
    a third to two thirds of its range along an axis in 16 frames. A shorter clip is the beginning of a longer one.

    The quantities are position (0 to 1 over the free range) and velocity (sides per frame, after the last bounce) in
    the last frame. No single frame shows the velocity, and the middle frame, the only one that the single-frame
    baseline of the evaluation sees, does not show the final position: predicting them needs several frames.

    The mean is black, not the pixels' own mean: with a background far from zero an untrained encoder encodes mostly
    the background (its position probe is at 51 % instead of 16 %).
    """

    mean = (0.0, 0.0, 0.0)
    std = (0.27, 0.27, 0.27)
    classes = tuple("0123456789")
    sample_name, dataset_name = "clip", "moving digits"
    fields = {
        "quantities": Field(
            shape=(8,),
            names=tuple(f"{name}/{axis}" for name in ("position", "velocity") for axis in ("x1", "y1", "x2", "y2")),
        )
    }

    def __init__(
        self, *, num_frames: PositiveInt, num_samples: PositiveInt = 10000, val_samples: PositiveInt = 2000,
        side: Annotated[int, Within(16, 1024)] = 64,
        speed: Annotated[tuple[float, float], Within(0, 0.5)] = (0.02, 0.04), seed: Seed = 0,
    ) -> None:  # fmt: skip
        super().__init__(num_samples, val_samples, side, seed)
        self.num_frames = num_frames
        self.speed = speed

    def __getitem__(self, index: int) -> Sample:
        """A clip [3, num_frames, side, side], the warm digit and the field quantities [8]; the digits alternate."""
        return self._render(index, self._random(index, 1))

    def draw(self, index: int, seed: int) -> Sample:
        """As `self[index]` with another start and velocity of the two digits: pure in index and seed."""
        return self._render(index, self._random(index, 2, seed))

    def _glyphs(self, index: int) -> tuple[Glyph, Glyph]:
        rng = self._random(index, 0)
        warm = write(index % 10, self.side, WARM, rng)
        return warm, write(int(rng.integers(10)), self.side, COOL, rng)

    def _render(self, index: int, rng: np.random.Generator) -> Sample:
        glyphs = self._glyphs(index)
        position, velocity = trajectories(glyphs, self.num_frames, self.speed, rng)
        canvas = np.zeros((3, self.num_frames, self.side + 2 * PAD, self.side + 2 * PAD), dtype=np.uint8)
        for number, glyph in enumerate(glyphs):
            stamp(canvas, glyph, ((position[:, number] - 0.5) * glyph.free + 0.5) * self.side + PAD)
        clip = torch.from_numpy(canvas[..., PAD:-PAD, PAD:-PAD].copy())
        last = np.concatenate([position[-1].ravel(), velocity[-1].ravel()], dtype=np.float32)
        return Sample(clip, index % 10, {"quantities": torch.from_numpy(last)})


def trajectories(
    glyphs: tuple[Glyph, Glyph], num_frames: int, speed: Bounds, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """-> [T, 2, 2] twice: position (share of the free range) and velocity (sides per frame), [T, digit, axis]."""
    start, direction, speeds = rng.uniform(size=(2, 2)), rng.uniform(0, 2 * pi, 2), rng.uniform(*speed, 2)
    velocity = speeds[:, None] * np.stack([np.cos(direction), np.sin(direction)], axis=1)  # [2, 2]
    free = np.stack([glyph.free for glyph in glyphs])
    unfolded = (start + velocity / free * np.arange(num_frames)[:, None, None]) % 2  # walls are mirrors
    return 1 - np.abs(1 - unfolded), np.where(unfolded < 1, velocity, -velocity)


def write(digit: int, side: int, colours: tuple[Bounds, ...], rng: np.random.Generator) -> Glyph:
    """The digit in a random handwriting, centred in its bounding box."""
    height, width, slant, stroke, *tint = rng.uniform(size=7)
    height = _between(HEIGHT, height) * side  # pixels
    pen = _between(STROKE, stroke) * height
    shear = np.array([[_between(WIDTH_RATIO, width), -MAX_SLANT * (2 * slant - 1)], [0, 1]]) * (height / 2 - pen)
    strokes = [points @ shear.T for points in STROKES[digit]]
    points = np.concatenate(strokes)
    low, high = points.min(axis=0), points.max(axis=0)
    middle, half = (low + high) / 2, (high - low) / 2 + pen  # [2], pixels
    x, y = (np.arange(2 * ceil(length + 1) + 1) - ceil(length + 1) - 0.5 for length in half)
    segments = np.concatenate([np.stack([line[:-1], line[1:]], axis=1) for line in strokes]) - middle
    field = _distance(x.astype(np.float32), y.astype(np.float32), segments.astype(np.float32)) - np.float32(pen)
    colour = np.array([_between(bounds, share) for bounds, share in zip(colours, tint, strict=True)])
    return Glyph(field, 1 - 2 * half / side, colour)


def stamp(canvas: np.ndarray, glyph: Glyph, centres: np.ndarray) -> None:
    """Draw the digit into uint8 [3, T, H, W] at each frame's centre [T, 2] (x, y in pixels)."""
    height, width = (length - 1 for length in glyph.field.shape)
    corner = centres - np.array([width, height]) / 2
    whole = np.floor(corner).astype(int)
    x, y = np.moveaxis((corner - whole).astype(np.float32), 1, 0)[..., None, None]  # [T, 1, 1] each
    lines = glyph.field[1:] * (1 - y) + glyph.field[:-1] * y  # [T, h, w + 1]
    inside = np.clip(0.5 - (lines[..., 1:] * (1 - x) + lines[..., :-1] * x), 0, 1)  # [T, h, w]
    painted = (glyph.colour.astype(np.float32)[:, None, None, None] * inside + 0.5).astype(np.uint8)
    for frame, (left, top) in enumerate(whole.tolist()):
        window = canvas[:, frame, top : top + height, left : left + width]
        np.maximum(window, painted[:, frame], out=window)


def _distance(x: np.ndarray, y: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """[w], [h], [S, 2, 2] -> [h, w]: distance of each pixel to the nearest segment."""
    start, along = segments[:, 0, :, None, None], (segments[:, 1] - segments[:, 0])[..., None, None]
    dx, dy = x - start[:, 0], y[:, None] - start[:, 1]  # [S, 1, w], [S, h, 1]
    share = np.clip((dx * along[:, 0] + dy * along[:, 1]) / np.square(along).sum(axis=1), 0, 1)  # [S, h, w]
    return np.sqrt((np.square(dx - share * along[:, 0]) + np.square(dy - share * along[:, 1])).min(axis=0))


def _between(bounds: Bounds, share: float) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * share


def _arc(x: float, y: float, width: float, height: float, begin: float, end: float) -> list[tuple[float, float]]:
    """Points of an ellipse with these half axes, between two angles in degrees: 0 is right, 90 is down."""
    steps = max(2, round(abs(end - begin) / 30))
    angles = [(begin + (end - begin) * step / steps) * pi / 180 for step in range(steps + 1)]
    return [(x + width * cos(angle), y + height * sin(angle)) for angle in angles]


STROKES: tuple[tuple[np.ndarray, ...], ...] = tuple(
    tuple(np.array(stroke, dtype=float) for stroke in strokes)
    for strokes in (
        (_arc(0, 0, 0.62, 1, 0, 360),),
        ([(-0.4, -0.55), (0.05, -1), (0.05, 1)], [(-0.4, 1), (0.5, 1)]),
        ([*_arc(0, -0.42, 0.58, 0.58, 190, 390), (-0.6, 1), (0.62, 1)],),
        (_arc(-0.05, -0.5, 0.55, 0.5, 205, 450), _arc(-0.05, 0.48, 0.64, 0.52, -90, 150)),
        ([(0.3, 1), (0.3, -1), (-0.65, 0.4), (0.65, 0.4)],),
        ([(0.55, -1), (-0.45, -1), (-0.5, -0.05), *_arc(-0.03, 0.35, 0.62, 0.65, -130, 145)],),
        ([(0.4, -1), (-0.05, -0.75), (-0.45, -0.2), (-0.6, 0.42)], _arc(0, 0.42, 0.6, 0.58, 0, 360)),
        ([(-0.6, -1), (0.6, -1), (-0.2, 1)],),
        (_arc(0, -0.52, 0.48, 0.48, 0, 360), _arc(0, 0.48, 0.6, 0.52, 0, 360)),
        (_arc(0, -0.42, 0.6, 0.58, 0, 360), [(0.6, -0.42), (0.5, 0.3), (0.15, 1)]),
    )
)
"""Polylines (x, y) of each digit within [-0.65, 0.65] by [-1, 1]; y points down."""
