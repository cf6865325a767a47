"""Clips of two bouncing digits, drawn on the fly from strokes of our own: what they show and how they move is known."""

from __future__ import annotations

from math import ceil, cos, pi, sin
from typing import Annotated, NamedTuple

import numpy as np
import torch

from jepa.types import Field, PositiveInt, Sample, Seed, Within

HEIGHT = (0.32, 0.42)
"""of an upright digit, in sides of the picture"""
SLIMNESS = (0.8, 1.1)
"""of its width against that of the strokes below"""
SLANT = 0.3
"""sideways to either side, for each unit of height"""
STROKE = (0.05, 0.09)
"""half the width of the pen, in heights"""
WARM = ((215, 255), (60, 165), (0, 45))
COOL = ((0, 45), (75, 195), (215, 255))
"""bounds of red, green and blue"""
PAD = 3
"""pixels around the canvas that a digit at the wall may touch with its smooth edge"""
Bounds = tuple[float, float]


class Glyph(NamedTuple):
    """One digit as it is written in a clip."""

    field: np.ndarray
    """float32 [h + 1, w + 1]: distance to the edge of the stroke in pixels, negative inside, half a pixel off centre"""
    free: np.ndarray
    """float [2]: how far its centre can go in x and y, in sides"""
    colour: np.ndarray
    """[3], 0 to 255"""


class MovingDigits:
    """Each clip shows a warm and a cool digit that fly straight and bounce off the walls; the warm one is the label.

    Digits, slant, size, pen and colour are pure in (seed, index); so are the start and the velocity of `self[index]`,
    while `draw` lets the same two digits fly from elsewhere. Positions are continuous, edges smooth, and where the
    digits overlap the larger value of a channel wins. `speed` is in sides per frame: at the default a digit covers a
    third to two thirds of its free range along an axis in 16 frames. Fewer frames are the beginning of the same flight.

    The quantities are position (0 to 1 over the free range) and velocity (sides per frame, after the last bounce) in
    the last frame. No single frame shows the velocity, and the middle one, all that the single-frame baseline of the
    evaluation sees, does not show the final position either: predicting them needs several frames.

    The mean is black, not the pixels' own: most of a frame is ground, and a ground far from zero would be most of what
    an untrained encoder says (its position probe stands at 51 % instead of 16 %).
    """

    channels = 3
    mean = (0.0, 0.0, 0.0)
    std = (0.27, 0.27, 0.27)
    in_memory = True
    classes = tuple("0123456789")
    fields = {
        "quantities": Field(
            shape=(8,),
            names=tuple(f"{what}/{axis}" for what in ("position", "velocity") for axis in ("x1", "y1", "x2", "y2")),
        )
    }

    def __init__(
        self,
        *,
        num_frames: PositiveInt,
        num_samples: PositiveInt = 10000,
        val_samples: PositiveInt = 2000,
        side: Annotated[int, Within(16, 1024)] = 64,
        speed: Annotated[tuple[float, float], Within(0, 0.5)] = (0.02, 0.04),
        seed: Seed = 0,
    ) -> None:
        self.num_frames = num_frames
        self.num_samples = num_samples
        self.val_samples = val_samples
        self.side = side
        self.speed = speed
        self.seed = seed
        self.stream = 0

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> Sample:
        """A clip [3, num_frames, side, side], the warm digit, and the field quantities [8]; the digits take turns."""
        return self._show(index, self._random(index, 1))

    def draw(self, index: int, seed: int) -> Sample:
        """As `self[index]`, but the two digits start elsewhere with another velocity: pure in index and seed."""
        return self._show(index, self._random(index, 2, seed))

    def describe(self, index: int) -> str:
        part = "held-out" if self.stream else "training"
        return f"{self.classes[index % 10]}, clip {index} of the {part} moving digits"

    def validation(self) -> MovingDigits | None:
        """Other clips of the same kind; the held-out part has none of its own."""
        if self.stream:
            return None
        held_out = MovingDigits(
            num_frames=self.num_frames, num_samples=self.val_samples, side=self.side, speed=self.speed, seed=self.seed
        )
        held_out.stream = 1
        return held_out

    def _random(self, index: int, purpose: int, seed: int = 0) -> np.random.Generator:
        if not 0 <= index < self.num_samples:
            raise IndexError(f"index {index} of {self.num_samples} clips")
        key = np.array([self.seed + (self.stream << 32), index], dtype=np.uint64)
        counter = np.array([0, 0, purpose, seed], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=counter))

    def _glyphs(self, index: int) -> tuple[Glyph, Glyph]:
        rng = self._random(index, 0)
        warm = write(index % 10, self.side, WARM, rng)
        return warm, write(int(rng.integers(10)), self.side, COOL, rng)

    def _show(self, index: int, rng: np.random.Generator) -> Sample:
        glyphs = self._glyphs(index)
        position, velocity = fly(glyphs, self.num_frames, self.speed, rng)
        canvas = np.zeros((3, self.num_frames, self.side + 2 * PAD, self.side + 2 * PAD), dtype=np.uint8)
        for number, glyph in enumerate(glyphs):
            stamp(canvas, glyph, ((position[:, number] - 0.5) * glyph.free + 0.5) * self.side + PAD)
        clip = torch.from_numpy(canvas[..., PAD:-PAD, PAD:-PAD].copy())
        last = np.concatenate([position[-1].ravel(), velocity[-1].ravel()], dtype=np.float32)
        return Sample(clip, index % 10, {"quantities": torch.from_numpy(last)})


def fly(
    glyphs: tuple[Glyph, Glyph], num_frames: int, speed: Bounds, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """-> [T, 2, 2] and [T, 2, 2]: position (share of the free range) and velocity (sides per frame), digit by x, y."""
    start, heading, pace = rng.uniform(size=(2, 2)), rng.uniform(0, 2 * pi, 2), rng.uniform(*speed, 2)
    velocity = pace[:, None] * np.stack([np.cos(heading), np.sin(heading)], axis=1)  # [2, 2]
    free = np.stack([glyph.free for glyph in glyphs])
    unfolded = (start + velocity / free * np.arange(num_frames)[:, None, None]) % 2  # walls are mirrors
    return 1 - np.abs(1 - unfolded), np.where(unfolded < 1, velocity, -velocity)


def write(digit: int, side: int, colours: tuple[Bounds, ...], rng: np.random.Generator) -> Glyph:
    """The digit in a hand of its own, centred in the box it fills."""
    height, slimness, slant, stroke, *tint = rng.uniform(size=7)
    height = _between(HEIGHT, height) * side  # pixels
    pen = _between(STROKE, stroke) * height
    shape = np.array([[_between(SLIMNESS, slimness), -SLANT * (2 * slant - 1)], [0, 1]]) * (height / 2 - pen)
    strokes = [points @ shape.T for points in STROKES[digit]]
    points = np.concatenate(strokes)
    low, high = points.min(axis=0), points.max(axis=0)
    middle, reach = (low + high) / 2, (high - low) / 2 + pen  # [2], pixels
    x, y = (np.arange(2 * ceil(half + 1) + 1) - ceil(half + 1) - 0.5 for half in reach)
    segments = np.concatenate([np.stack([line[:-1], line[1:]], axis=1) for line in strokes]) - middle
    field = _distance(x.astype(np.float32), y.astype(np.float32), segments.astype(np.float32)) - np.float32(pen)
    colour = np.array([_between(bounds, share) for bounds, share in zip(colours, tint, strict=True)])
    return Glyph(field, 1 - 2 * reach / side, colour)


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
        place = canvas[:, frame, top : top + height, left : left + width]
        np.maximum(place, painted[:, frame], out=place)


def _distance(x: np.ndarray, y: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """[w], [h], [S, 2, 2] -> [h, w]: from each pixel to the nearest of the segments."""
    start, along = segments[:, 0, :, None, None], (segments[:, 1] - segments[:, 0])[..., None, None]
    dx, dy = x - start[:, 0], y[:, None] - start[:, 1]  # [S, 1, w], [S, h, 1]
    share = np.clip((dx * along[:, 0] + dy * along[:, 1]) / np.square(along).sum(axis=1), 0, 1)  # [S, h, w]
    return np.sqrt((np.square(dx - share * along[:, 0]) + np.square(dy - share * along[:, 1])).min(axis=0))


def _between(bounds: Bounds, share: float) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * share


def _arc(x: float, y: float, width: float, height: float, begin: float, end: float) -> list[tuple[float, float]]:
    """Points of an ellipse with these half axes, between two angles in degrees, 0 to the right and 90 below."""
    pieces = max(2, round(abs(end - begin) / 30))
    angles = [(begin + (end - begin) * piece / pieces) * pi / 180 for piece in range(pieces + 1)]
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
"""of each digit: polylines in x and y, which points down, within [-0.65, 0.65] by [-1, 1]"""
