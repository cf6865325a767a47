"""Pictures that are drawn on the fly: a labelled data set that needs no download."""

from __future__ import annotations

from collections.abc import Callable
from math import cos, pi, sin
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from jepa.types import PositiveInt, Seed, Within

Field = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(x, y) -> a distance to the outline, negative inside"""
MAX_CACHE_BYTES = 1 << 28
"""of drawn pictures; a larger data set is drawn again in every epoch"""
REACH = 1.56
"""no shape of area pi leaves the circle of this radius"""
SPACING = (0.3, 0.5)
"""of the copies, in sides of the picture"""
RADIUS = (0.3, 0.4)
"""of the disc of a copy's area, in spacings; the tips of the largest are cut where they touch their neighbours"""
TURN = 0.3
"""of a copy to either side, in radians"""
DARKEST = 0.3
"""smallest value of a colour; the ground is black"""


class Shapes:
    """Each picture shows a crowd of one kind of shape on black, and the kind is its label.

    The kinds are disc, ring, square, triangle, cross, bar, crescent, star, corner and half disc, upright to within
    TURN, and all of the same area at the same scale. Every copy has a colour, a size, a tilt and a place of its own,
    drawn apart from all others: the kind and the spacing are all that one part of a picture tells of another, while the
    pixel at a place, and the mean colour, tell nothing of the kind. A picture is a pure function of (seed, index),
    drawn at `side` x `side` pixels with smooth edges; the held-out part has a random stream of its own.

    The mean and std are not the pixels' own (0.25 and 0.33): with black far from zero the quickstart learns faster.
    """

    channels = 3
    mean = (0.5, 0.5, 0.5)
    std = (0.27, 0.27, 0.27)
    in_memory = True

    def __init__(
        self,
        *,
        num_samples: PositiveInt = 20000,
        val_samples: PositiveInt = 4000,
        side: Annotated[int, Within(8, 1024)] = 64,
        seed: Seed = 0,
    ) -> None:
        self.val_samples = val_samples
        self.side = side
        self.seed = seed
        self.classes = tuple(name for name, _ in KINDS)
        self._start(num_samples, stream=0)

    def _start(self, num_samples: int, stream: int) -> None:
        self.num_samples = num_samples
        self.stream = stream
        size = num_samples * self.channels * self.side**2
        self._drawn: dict[int, Tensor] | None = {} if size <= MAX_CACHE_BYTES else None

    def __len__(self) -> int:
        return self.num_samples

    @property
    def labels(self) -> np.ndarray:
        """long [n]"""
        return np.arange(self.num_samples) % len(KINDS)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """uint8 [3, 1, side, side] and the number of the kind; the kinds take turns."""
        if not 0 <= index < self.num_samples:
            raise IndexError(f"index {index} of {self.num_samples} pictures")
        label = index % len(KINDS)
        if self._drawn is None:
            return self._draw(index, label), label
        if index not in self._drawn:
            self._drawn[index] = self._draw(index, label)
        return self._drawn[index].clone(), label

    def _draw(self, index: int, label: int) -> Tensor:
        key = np.array([self.seed + (self.stream << 32), index], dtype=np.uint64)
        picture = draw(KINDS[label][1], self.side, np.random.Generator(np.random.Philox(key=key)))
        return torch.from_numpy(picture)[:, None]

    def describe(self, index: int) -> str:
        part = "held-out" if self.stream else "training"
        return f"{self.classes[index % len(KINDS)]}, picture {index} of the {part} shapes"

    def validation(self) -> Shapes | None:
        """Other pictures of the same kinds; the held-out part has none of its own."""
        if self.stream:
            return None
        held_out = Shapes(num_samples=self.val_samples, side=self.side, seed=self.seed)
        held_out._start(self.val_samples, stream=1)
        return held_out


def draw(field: Field, side: int, rng: np.random.Generator) -> np.ndarray:
    """-> uint8 [3, side, side]: a turned lattice of cells with a copy of the shape somewhere in each."""
    ruler = (np.arange(side, dtype=np.float32) + 0.5) / side - 0.5
    spacing, turn, shift_x, shift_y = rng.uniform(*SPACING), rng.uniform(0, 2 * pi), rng.uniform(), rng.uniform()
    along, upward = cos(turn) / spacing, sin(turn) / spacing
    x = along * ruler - upward * ruler[:, None] + shift_x  # in cells
    y = upward * ruler + along * ruler[:, None] + shift_y
    column, row = np.floor(x), np.floor(y)
    across = 2 * int(1 / spacing + 2)  # cells that a picture can touch
    cell = ((row + across // 2) * across + column + across // 2).astype(np.intp)
    return _paint(field, (x - column - 0.5, y - row - 0.5), cell, across**2, (spacing * side, turn), rng)


def _paint(
    field: Field, place: tuple[np.ndarray, np.ndarray], cell: np.ndarray, num_cells: int, lattice: tuple[float, float],
    rng: np.random.Generator,
) -> np.ndarray:  # fmt: skip
    """Place in the cell [side, side] x 2, number of the cell [side, side] -> uint8 [3, side, side].

    `lattice` is the size of a cell in pixels and its turn.
    """
    pixels, lattice_turn = lattice
    radius = rng.uniform(*RADIUS, num_cells)  # of the disc of the same area, in cells
    turn = lattice_turn + rng.uniform(-TURN, TURN, num_cells)
    room = np.maximum(0.5 - REACH * radius, 0)
    copies = np.stack([np.cos(turn), np.sin(turn), radius, *(rng.uniform(-1, 1, (2, num_cells)) * room)])
    cos, sin, radius, x0, y0 = copies.astype(np.float32)[:, cell]
    x, y = (place[0] - x0) / radius, (place[1] - y0) / radius
    inside = np.clip(0.5 - field(cos * x + sin * y, cos * y - sin * x) * radius * pixels, 0, 1)  # smooth over one pixel
    colours = rng.uniform(255 * DARKEST, 255, (3, num_cells)).astype(np.float32)
    return (inside * colours[:, cell] + 0.5).astype(np.uint8)


def disc(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.hypot(x, y) - 1


def ring(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.abs(np.hypot(x, y) - 0.85) - 0.294


def square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(x), np.abs(y)) - 0.886


def triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(0.866 * np.abs(x) - 0.5 * y, y) - 0.777


def cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.maximum(x, y) - 1.189, np.minimum(x, y) - 0.396)


def bar(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(x) - 1.4, np.abs(y) - 0.561)


def crescent(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.hypot(x, y) - 1.374, 1.004 - np.hypot(x - 0.634, y))


def star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    angle = np.arctan2(y, x) % (0.4 * np.pi) - 0.2 * np.pi  # from the nearest notch
    radius = np.hypot(x, y)
    return 0.854 * (radius * np.cos(angle) - 0.694) - 0.521 * np.abs(radius * np.sin(angle))


def corner(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.maximum(np.abs(x), np.abs(y)) - 1.1, np.minimum(x, y) + 0.203)


def half_disc(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.hypot(x, y + 0.6) - 1.414, -y - 0.6)


KINDS: tuple[tuple[str, Field], ...] = (
    ("disc", disc),
    ("ring", ring),
    ("square", square),
    ("triangle", triangle),
    ("cross", cross),
    ("bar", bar),
    ("crescent", crescent),
    ("star", star),
    ("corner", corner),
    ("half disc", half_disc),
)
