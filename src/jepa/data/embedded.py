"""Pictures drawn on the fly: a labelled data set that needs no download."""

from __future__ import annotations

import copy
from collections.abc import Callable
from math import cos, pi, sin
from typing import Annotated, Self

import numpy as np
import torch
from torch import Tensor

from jepa.types import PositiveInt, Seed, Within

Field = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(x, y) -> signed distance to the outline, negative inside."""
MAX_CACHE_BYTES = 1 << 28
"""Largest size of a data set whose pictures are cached; a larger one is drawn again in every epoch."""
MAX_RADIUS = 1.56
"""Radius of a circle that encloses every shape of area pi."""
SPACING = (0.3, 0.5)
"""Distance between copies, in picture sides."""
RADIUS = (0.3, 0.4)
"""Radius of the disc of a copy's area, in spacings; the largest copies are cut at the borders of their cells."""
MAX_TILT = 0.3
"""Largest rotation of a copy in either direction, in radians."""
MIN_COLOUR = 0.3
"""Smallest value of a colour channel; the background is black."""


class SyntheticDataset:
    """Samples drawn from (seed, index) alone; the held-out part uses random numbers of its own."""

    channels = 3
    in_memory = True
    classes: tuple[str, ...]
    sample_name: str
    dataset_name: str

    def __init__(self, num_samples: int, val_samples: int, side: int, seed: int) -> None:
        self.num_samples, self.val_samples = num_samples, val_samples
        self.side, self.seed = side, seed
        self.stream = 0

    def __len__(self) -> int:
        return self.num_samples

    def describe(self, index: int) -> str:
        part = "held-out" if self.stream else "training"
        name = self.classes[index % len(self.classes)]
        return f"{name}, {self.sample_name} {index} of the {part} {self.dataset_name}"

    def validation(self) -> Self | None:
        """Other samples of the same distribution; the held-out part has no held-out part."""
        if self.stream:
            return None
        held_out = copy.copy(self)
        held_out.num_samples, held_out.stream = self.val_samples, 1
        return held_out

    def _random(self, index: int, purpose: int = 0, seed: int = 0) -> np.random.Generator:
        if not 0 <= index < self.num_samples:
            raise IndexError(f"index {index} of {self.num_samples} {self.sample_name}s")
        key = np.array([self.seed + (self.stream << 32), index], dtype=np.uint64)
        counter = np.array([0, 0, purpose, seed], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=counter))


class Shapes(SyntheticDataset):
    """Each picture shows many copies of one kind of shape on black, and the kind is its label.

    The kinds are disc, ring, square, triangle, cross, bar, crescent, star, corner and half disc, upright to within
    MAX_TILT, and all of the same area at the same scale. Colour, size, tilt and position are drawn independently for
    each copy, so that two parts of a picture have only the kind and the spacing in common; neither a single pixel nor
    the mean colour depends on the kind. Pictures have `side` x `side` pixels and smooth edges.

    The mean and std are not the pixels' own (0.25 and 0.33): with black far from zero the quickstart learns faster.
    """

    mean = (0.5, 0.5, 0.5)
    std = (0.27, 0.27, 0.27)
    sample_name, dataset_name = "picture", "shapes"

    def __init__(
        self, *, num_samples: PositiveInt = 20000, val_samples: PositiveInt = 4000,
        side: Annotated[int, Within(8, 1024)] = 64, seed: Seed = 0,
    ) -> None:  # fmt: skip
        super().__init__(num_samples, val_samples, side, seed)
        self.classes = tuple(field.__name__.replace("_", " ") for field in KINDS)
        self._cache: dict[tuple[int, int], Tensor] = {}

    @property
    def labels(self) -> np.ndarray:
        """long [n]"""
        return np.arange(self.num_samples) % len(KINDS)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """uint8 [3, 1, side, side] and the class; the classes alternate."""
        label = index % len(KINDS)
        picture = self._cache.get((self.stream, index))
        if picture is None:
            picture = torch.from_numpy(draw(KINDS[label], self.side, self._random(index)))[:, None]
            if self.num_samples * picture.numel() <= MAX_CACHE_BYTES:
                self._cache[self.stream, index] = picture
        return picture.clone(), label


def draw(field: Field, side: int, rng: np.random.Generator) -> np.ndarray:
    """-> uint8 [3, side, side]: a rotated square lattice with a copy of the shape in each cell."""
    pixels = (np.arange(side, dtype=np.float32) + 0.5) / side - 0.5
    spacing, angle, shift_x, shift_y = rng.uniform(*SPACING), rng.uniform(0, 2 * pi), rng.uniform(), rng.uniform()
    along, upward = cos(angle) / spacing, sin(angle) / spacing
    x = along * pixels - upward * pixels[:, None] + shift_x  # in cells
    y = upward * pixels + along * pixels[:, None] + shift_y
    column, row = np.floor(x), np.floor(y)
    across = 2 * int(1 / spacing + 2)  # cells that a picture can touch
    cell = ((row + across // 2) * across + column + across // 2).astype(np.intp)
    return _paint(field, (x - column - 0.5, y - row - 0.5), cell, across**2, (spacing * side, angle), rng)


def _paint(
    field: Field, offset: tuple[np.ndarray, np.ndarray], cell: np.ndarray, num_cells: int, lattice: tuple[float, float],
    rng: np.random.Generator,
) -> np.ndarray:  # fmt: skip
    """Offset from the cell's centre [side, side] x 2, number of the cell [side, side] -> uint8 [3, side, side].

    `lattice` is the size of a cell in pixels and its rotation.
    """
    pixels, lattice_angle = lattice
    radius = rng.uniform(*RADIUS, num_cells)  # of the disc of the same area, in cells
    angle = lattice_angle + rng.uniform(-MAX_TILT, MAX_TILT, num_cells)
    slack = np.maximum(0.5 - MAX_RADIUS * radius, 0)
    copies = np.stack([np.cos(angle), np.sin(angle), radius, *(rng.uniform(-1, 1, (2, num_cells)) * slack)])
    cos, sin, radius, x0, y0 = copies.astype(np.float32)[:, cell]
    x, y = (offset[0] - x0) / radius, (offset[1] - y0) / radius
    inside = np.clip(0.5 - field(cos * x + sin * y, cos * y - sin * x) * radius * pixels, 0, 1)  # smooth over one pixel
    colours = rng.uniform(255 * MIN_COLOUR, 255, (3, num_cells)).astype(np.float32)
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


KINDS = (disc, ring, square, triangle, cross, bar, crescent, star, corner, half_disc)
