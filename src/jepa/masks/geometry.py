"""Sizes of masks on a patch grid, computed without torch, so that a configuration is checked at once.

The attribute `faults` of a masker names a function (grid, masker's arguments) -> list of errors, each a sentence that
begins with the key and its value ("ratio=0.999 ..."). The constructors raise the same sentences.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cache
from typing import Any

from jepa.suggestions import suggestion
from jepa.types import PatchGrid

LEVELS = 33
"""Number of evenly spaced values of a scale or aspect, so that the possible block shapes are a finite list."""
Shape = tuple[int, int]
"""Height and width."""


def local_size(size: Any, image_size: Shape, patch_size: Shape) -> Shape:
    """Height and width of local crops in pixels; null is half of the image, rounded to whole patches."""
    if size is None:
        size = [max(1, round(side / (2 * p))) * p for side, p in zip(image_size, patch_size, strict=True)]
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def tube_faults(grid: PatchGrid, ratio: Any = 0.75) -> list[str]:
    """Errors of a tube mask, which is a random mask of one frame."""
    return random_faults(PatchGrid(1, grid.h, grid.w), ratio)


def random_faults(grid: PatchGrid, ratio: Any = 0.75) -> list[str]:
    if faults := _ratio_faults(ratio, grid):
        return faults
    if grid.num_context(ratio) == grid.num_tokens:
        return [f"ratio={ratio} leaves no target: it hides none of the {grid.num_tokens} tokens"]
    return []


def block_faults(grid: PatchGrid, **values: Any) -> list[str]:
    return BlockGeometry(grid=grid, **values).faults()


def temporal_faults(grid: PatchGrid, **values: Any) -> list[str]:
    return TemporalGeometry(grid=grid, **values).faults()


def block_shape(grid: PatchGrid, scale: float, aspect: float) -> Shape:
    """Height and width in tokens of a block that covers the share `scale`; the aspect is limited to fit the grid."""
    area = scale * grid.h * grid.w
    aspect = min(max(aspect, area / grid.w**2), grid.h**2 / area)
    return max(1, round(math.sqrt(area * aspect))), max(1, round(math.sqrt(area / aspect)))


@dataclass(frozen=True, kw_only=True)
class BlockGeometry:
    """Block shapes and token counts of multi-block masking (I-JEPA, section 3); a block covers all time steps."""

    grid: PatchGrid
    ratio: float | None = 0.75
    num_targets: int = 4
    target_scale: Sequence[float] = (0.15, 0.2)
    target_aspect: Sequence[float] = (0.75, 1.5)
    context_scale: Sequence[float] = (0.85, 1.0)

    def target_shapes(self) -> list[Shape]:
        """One shape for each pair of a scale and an aspect level, so that a uniform choice draws both independently."""
        scales, aspects = _levels(self.target_scale), _levels(self.target_aspect)
        return [block_shape(self.grid, scale, aspect) for scale in scales for aspect in aspects]

    def context_shapes(self) -> list[Shape]:
        """One shape for each scale level, with the aspect of the grid: scale 1 is the whole grid."""
        return [block_shape(self.grid, scale, self.grid.h / self.grid.w) for scale in _levels(self.context_scale)]

    def num_context(self) -> int:
        """K: from `ratio`, or without it the number of tokens that nine draws in ten leave free of targets."""
        if self.ratio is not None:
            return self.grid.num_context(self.ratio)
        return min(self._free_patches(quantile=0.1) * self.grid.t, self.grid.num_tokens - self._max_target())

    def faults(self) -> list[str]:
        """Errors; none if every draw can have K context tokens beside its targets."""
        faults = [] if self.ratio is None else _ratio_faults(self.ratio, self.grid)
        for name, upper in (("target_scale", 1.0), ("target_aspect", math.inf), ("context_scale", 1.0)):
            faults += _range_faults(name, getattr(self, name), upper)
        faults += _count_faults("num_targets", self.num_targets)
        return faults or self._room_faults()

    def _room_faults(self) -> list[str]:
        tokens, context, target = self.grid.num_tokens, self.num_context(), self._max_target()
        if context < 1:
            return [f"target_scale={_show(self.target_scale)} with num_targets={self.num_targets} leaves no context"]
        if context + target > tokens:
            return [
                f"ratio={self.ratio} keeps {context} of {tokens} tokens as context, a target block takes {target}: "
                f"no room for both, ratio must be above {(target - 0.5) / tokens:.2f}"
            ]
        return []

    def _max_target(self) -> int:
        return max(height * width for height, width in self.target_shapes()) * self.grid.t

    def _free_patches(self, quantile: float, draws: int = 2000) -> int:
        """Quantile of the number of patches of a context block outside the targets, over a fixed set of draws."""
        rng = random.Random(0)
        targets, contexts = self.target_shapes(), self.context_shapes()
        counts = []
        for _ in range(draws):
            shape, hidden = rng.choice(targets), 0
            for _ in range(self.num_targets):
                hidden |= self._random_block(shape, rng)
            counts.append((self._random_block(rng.choice(contexts), rng) & ~hidden).bit_count())
        return sorted(counts)[int(quantile * draws)]

    def _random_block(self, shape: Shape, rng: random.Random) -> int:
        """A block at a random position of a frame, as an integer with one bit for each patch."""
        top, left = rng.randint(0, self.grid.h - shape[0]), rng.randint(0, self.grid.w - shape[1])
        return _block_bits(shape, self.grid.w) << (self.grid.w * top + left)


@dataclass(frozen=True, kw_only=True)
class TemporalGeometry:
    """Splits and token counts of a mask that hides the future."""

    grid: PatchGrid
    horizon: int = 1
    split: int | None = None
    past: int | None = None
    ratio: float | None = None

    def splits(self) -> range:
        """Possible numbers of past steps."""
        first, last = self.split or self.past, self.split or self.grid.t - self.horizon
        return range(first or max(1, min(self.grid.t // 2, last)), last + 1)

    def num_context(self) -> int:
        return self.splits().start * self.grid.h * self.grid.w

    def num_targets(self) -> int:
        """J, the number of tokens that are predicted in each future step."""
        num_patches = self.grid.h * self.grid.w
        return num_patches if self.ratio is None else max(1, round(self.ratio * num_patches))

    def faults(self) -> list[str]:
        faults = _count_faults("horizon", self.horizon)
        for name, value in (("split", self.split), ("past", self.past)):
            faults += [] if value is None else _count_faults(name, value)
        if self.split is not None and self.past is not None:
            faults.append(f"past={self.past} must be null with split={self.split}: nothing is drawn")
        if self.ratio is not None and not (_is_number(self.ratio) and 0 < self.ratio <= 1):
            faults.append(f"ratio={self.ratio} must be above 0 and at most 1, or null: the share to predict")
        return faults or self._length_faults()

    def _length_faults(self) -> list[str]:
        past = self.split or self.past or 1
        required, steps = past + self.horizon, self.grid.t
        if required <= steps:
            return []
        condition = f" with split={self.split}" if self.split else f" with past={self.past}" if self.past else ""
        remedy = "raise num_frames or lower the others"
        if steps == 1:
            remedy = f"choose a dataset that delivers clips, and num_frames for at least {required} steps"
        return [
            f"horizon={self.horizon} needs {required} time steps{condition}, {past} of context and {self.horizon} to "
            f"predict, the clip has {steps}: {remedy}"
        ]


@dataclass(frozen=True, kw_only=True)
class CuboidGeometry:
    """Block shapes and token counts of one mask set of V-JEPA (Bardes et al. 2024, section 3.2) on one grid."""

    grid: PatchGrid
    num_blocks: int
    spatial_scale: tuple[float, float]
    aspect: tuple[float, float] = (0.75, 1.5)
    temporal_scale: tuple[float, float] = (1.0, 1.0)

    @classmethod
    def of(cls, grid: PatchGrid, values: Mapping[str, Any]) -> CuboidGeometry:
        """From the keys of a mask set; lists become tuples, so that the geometry is hashable."""
        hashable: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(grid=grid, **hashable)

    def shapes(self) -> list[Shape]:
        """One shape for each pair of a scale and an aspect level, as for images."""
        scales, aspects = dict.fromkeys(_levels(self.spatial_scale)), dict.fromkeys(_levels(self.aspect))
        return [block_shape(self.grid, scale, aspect) for scale in scales for aspect in aspects]

    def durations(self) -> list[int]:
        """Length of a block in time steps of the block grid, one for each level of the temporal scale."""
        return [min(max(1, round(n)), self.block_grid().t) for n in self._lengths()]

    def block_grid(self) -> PatchGrid:
        """The grid that blocks are drawn on: a single frame if every block covers all time steps."""
        return PatchGrid(self.grid.t if round(min(self._lengths())) < self.grid.t else 1, self.grid.h, self.grid.w)

    def _lengths(self) -> list[float]:
        return [scale * self.grid.t for scale in dict.fromkeys(_levels(self.temporal_scale))]

    def counts(self) -> tuple[int, int]:
        """K and J: nine draws in ten leave at least K tokens free, and nine in ten hide at least J."""
        sizes = _union_sizes(self)
        tenth = len(sizes) // 10
        return max(1, self.grid.num_tokens - sizes[-1 - tenth]), sizes[tenth]

    def faults(self) -> list[str]:
        faults = _count_faults("num_blocks", self.num_blocks)
        for name, upper in (("spatial_scale", 1.0), ("aspect", math.inf), ("temporal_scale", 1.0)):
            faults += _range_faults(name, getattr(self, name), upper)
        if not faults and self.counts()[1] == self.grid.num_tokens:
            scale = _show(self.spatial_scale)
            faults.append(f"spatial_scale={scale} leaves no context with num_blocks={self.num_blocks}: lower one")
        return faults


@cache
def _union_sizes(geometry: CuboidGeometry, draws: int = 300) -> list[int]:
    """Numbers of tokens in the union of the blocks of a set, over a fixed set of draws, ascending."""
    rng, grid = random.Random(0), geometry.block_grid()
    durations, shapes = geometry.durations(), geometry.shapes()
    repeats = {n: sum(1 << (grid.h * grid.w * step) for step in range(n)) for n in durations}
    blocks = {shape: _block_bits(shape, grid.w) for shape in shapes}
    sizes = []
    for _ in range(draws):
        hidden = 0
        for _ in range(geometry.num_blocks):
            duration, (height, width) = rng.choice(durations), rng.choice(shapes)
            step = int(rng.random() * (grid.t - duration + 1))
            row = int(rng.random() * (grid.h - height + 1))
            column = int(rng.random() * (grid.w - width + 1))
            hidden |= blocks[height, width] * repeats[duration] << ((step * grid.h + row) * grid.w + column)
        sizes.append(hidden.bit_count() * (geometry.grid.t // grid.t))
    return sorted(sizes)


def _block_bits(shape: Shape, columns: int) -> int:
    """A block in the upper left corner of a frame, as an integer with one bit for each patch."""
    return sum((1 << shape[1]) - 1 << (columns * row) for row in range(shape[0]))


def multiblock_faults(grid: PatchGrid, sets: Any = None) -> list[str]:
    """Errors of the mask sets, which begin with their key in the list ("sets.1.aspect=3 ...")."""
    names = {field.name: field.default is MISSING for field in fields(CuboidGeometry) if field.name != "grid"}
    if not isinstance(sets, Sequence) or isinstance(sets, str) or not sets:
        return [f"sets={_show(sets)} must be a list with at least one mask set, each with the keys {', '.join(names)}"]
    faults = []
    for number, values in enumerate(sets):
        if not isinstance(values, Mapping):
            faults.append(f"sets.{number}={values} must be a mask set, with the keys {', '.join(names)}")
            continue
        errors = [
            f"sets.{number}.{key}={_show(value)} must go: a mask set has no {key!r}{suggestion(key, names)}"
            for key, value in values.items()
            if key not in names
        ]
        missing = [name for name, is_required in names.items() if is_required and name not in values]
        errors += [f"sets.{number}={values} must have the key {name}" for name in missing]
        faults += errors or [f"sets.{number}.{fault}" for fault in CuboidGeometry.of(grid, values).faults()]
    return faults


def show_grid(grid: PatchGrid) -> str:
    """The grid as "14x14", or "8x14x14" for a clip."""
    return "x".join(str(side) for side in (grid.t, grid.h, grid.w)[grid.t == 1 :])


def _levels(bounds: Sequence[float]) -> list[float]:
    low, high = bounds
    return [low + (high - low) * level / (LEVELS - 1) for level in range(LEVELS)]


def _count_faults(name: str, value: Any) -> list[str]:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return []
    return [f"{name}={value} must be a whole number of at least 1"]


def _ratio_faults(ratio: Any, grid: PatchGrid) -> list[str]:
    if not _is_number(ratio) or not 0 < ratio < 1:
        return [f"ratio={ratio} must be between 0 and 1: the share of tokens hidden from the context encoder"]
    if grid.num_context(ratio) < 1:
        return [f"ratio={ratio} leaves no context: it hides all {grid.num_tokens} tokens of the {show_grid(grid)} grid"]
    return []


def _range_faults(name: str, bounds: Any, upper: float) -> list[str]:
    """The error if `bounds` are not two numbers, the smaller first, above 0 and at most `upper`."""
    is_pair = isinstance(bounds, Sequence) and len(bounds) == 2 and all(_is_number(bound) for bound in bounds)
    if is_pair and 0 < bounds[0] <= bounds[1] <= upper and bounds[1] < math.inf:
        return []
    limit = "" if upper == math.inf else f" and at most {upper:g}"
    return [f"{name}={_show(bounds)} must be two numbers, the smaller first, above 0{limit}"]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _show(value: Any) -> str:
    return str(list(value)) if isinstance(value, tuple | list) else str(value)
