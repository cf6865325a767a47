"""Sizes of masks, worked out from a patch grid without torch, so that a configuration can be refused in a moment.

A masker names a function as its `faults`: of the grid and the masker's arguments it returns every fault as a sentence
that begins with the key at fault ("ratio=0.999 ..."). The constructors raise the same sentences.
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
"""Scale and aspect each take this many evenly spaced values, so that the possible block shapes are a finite list."""
Shape = tuple[int, int]


def local_size(given: Any, image_size: Shape, patch_size: Shape) -> Shape:
    """Height and width in pixels of smaller crops: as given, or half of the image rounded to whole patches."""
    if given is None:
        height, width = (max(1, round(side / (2 * p))) * p for side, p in zip(image_size, patch_size, strict=True))
    else:
        height, width = (given, given) if isinstance(given, int) else given
    return height, width


def tube_faults(grid: PatchGrid, ratio: Any = 0.75) -> list[str]:
    """Tubes are random masks of one frame."""
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
    """Height and width in tokens of a block that covers the share `scale`; an aspect too long for the grid is bent."""
    area = scale * grid.h * grid.w
    fitting = min(max(aspect, area / grid.w**2), grid.h**2 / area)
    return max(1, round(math.sqrt(area * fitting))), max(1, round(math.sqrt(area / fitting)))


@dataclass(frozen=True, kw_only=True)
class BlockGeometry:
    """Block shapes and token counts of multi-block masking (I-JEPA, section 3); blocks last through all time steps."""

    grid: PatchGrid
    ratio: float | None = 0.75
    num_targets: int = 4
    target_scale: Sequence[float] = (0.15, 0.2)
    target_aspect: Sequence[float] = (0.75, 1.5)
    context_scale: Sequence[float] = (0.85, 1.0)

    def target_shapes(self) -> list[Shape]:
        """One entry for each pair of a scale and an aspect level: a uniform pick draws the two independently."""
        scales, aspects = _levels(self.target_scale), _levels(self.target_aspect)
        return [block_shape(self.grid, scale, aspect) for scale in scales for aspect in aspects]

    def context_shapes(self) -> list[Shape]:
        """One entry for each scale level, in the proportions of the grid: scale 1 is the whole grid."""
        return [block_shape(self.grid, scale, self.grid.h / self.grid.w) for scale in _levels(self.context_scale)]

    def num_context(self) -> int:
        """K, a matter of the configuration alone: from `ratio`, or what nine draws in ten leave free of targets."""
        if self.ratio is not None:
            return self.grid.num_context(self.ratio)
        return min(self._free_patches(quantile=0.1) * self.grid.t, self.grid.num_tokens - self._max_target())

    def faults(self) -> list[str]:
        """Why these blocks cannot be drawn; empty when every draw can give K context tokens beside its targets."""
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
        """Quantile of the patches of a context block outside its targets, over a fixed set of draws."""
        draw = random.Random(0)
        targets, contexts = self.target_shapes(), self.context_shapes()
        counts = []
        for _ in range(draws):
            shape, hidden = draw.choice(targets), 0
            for _ in range(self.num_targets):
                hidden |= self._place(shape, draw)
            counts.append((self._place(draw.choice(contexts), draw) & ~hidden).bit_count())
        return sorted(counts)[int(quantile * draws)]

    def _place(self, shape: Shape, draw: random.Random) -> int:
        """A block somewhere on a frame, as an integer with one bit for each patch."""
        (height, width), columns = shape, self.grid.w
        row = (1 << width) - 1
        block = sum(row << (columns * line) for line in range(height))
        return block << (columns * draw.randint(0, self.grid.h - height) + draw.randint(0, columns - width))


@dataclass(frozen=True, kw_only=True)
class TemporalGeometry:
    """Split points and token counts of a mask that hides the future."""

    grid: PatchGrid
    horizon: int = 1
    split: int | None = None
    past: int | None = None
    ratio: float | None = None

    def splits(self) -> range:
        """The numbers of past steps that are drawn from."""
        first, last = self.split or self.past, self.split or self.grid.t - self.horizon
        return range(first or max(1, min(self.grid.t // 2, last)), last + 1)

    def num_context(self) -> int:
        return self.splits().start * self.grid.h * self.grid.w

    def num_targets(self) -> int:
        """J, of each future step."""
        num_patches = self.grid.h * self.grid.w
        return num_patches if self.ratio is None else max(1, round(self.ratio * num_patches))

    def faults(self) -> list[str]:
        faults = _count_faults("horizon", self.horizon)
        for name, value in (("split", self.split), ("past", self.past)):
            faults += [] if value is None else _count_faults(name, value)
        if self.split is not None and self.past is not None:
            faults.append(f"past={self.past} must be null with split={self.split}: nothing is drawn")
        if self.ratio is not None and not (_is_number(self.ratio) and 0 < self.ratio <= 1):
            faults.append(
                f"ratio={self.ratio} must lie above 0 and be at most 1, or null: the share of the future to predict"
            )
        return faults or self._length_faults()

    def _length_faults(self) -> list[str]:
        seen = self.split or self.past or 1
        needed, steps = seen + self.horizon, self.grid.t
        if needed <= steps:
            return []
        given = f" with split={self.split}" if self.split else f" with past={self.past}" if self.past else ""
        remedy = "raise num_frames or lower the others"
        if steps == 1:
            remedy = f"choose a dataset that delivers clips, and num_frames for at least {needed} steps"
        return [
            f"horizon={self.horizon} needs {needed} time steps{given}, {seen} to see and {self.horizon} to predict, "
            f"the clip has {steps}: {remedy}"
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
        """From the values of a mask set, whose lists become tuples: a geometry can be hashed."""
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(grid=grid, **plain)

    def shapes(self) -> list[Shape]:
        """One entry for each pair of a scale and an aspect level, as for images."""
        scales, aspects = dict.fromkeys(_levels(self.spatial_scale)), dict.fromkeys(_levels(self.aspect))
        return [block_shape(self.grid, scale, aspect) for scale in scales for aspect in aspects]

    def durations(self) -> list[int]:
        """Time steps of the drawn grid that a block lasts, one entry for each level."""
        return [min(max(1, round(n)), self.drawn_grid().t) for n in self._lengths()]

    def drawn_grid(self) -> PatchGrid:
        """The grid that blocks are drawn on: a single frame where they always last through the clip."""
        return PatchGrid(self.grid.t if round(min(self._lengths())) < self.grid.t else 1, self.grid.h, self.grid.w)

    def _lengths(self) -> list[float]:
        return [scale * self.grid.t for scale in dict.fromkeys(_levels(self.temporal_scale))]

    def counts(self) -> tuple[int, int]:
        """K and J, a matter of the configuration alone: nine draws in ten leave that many free, nine hide that many."""
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
    """Tokens that the blocks of a set hide, over a fixed set of draws, the fewest first."""
    draw, grid = random.Random(0), geometry.drawn_grid()
    durations, shapes = geometry.durations(), geometry.shapes()
    stretches = {n: sum(1 << (grid.h * grid.w * step) for step in range(n)) for n in durations}
    blocks = {(h, w): sum((1 << w) - 1 << (grid.w * row) for row in range(h)) for h, w in shapes}
    sizes = []
    for _ in range(draws):
        hidden = 0
        for _ in range(geometry.num_blocks):
            duration, (height, width) = draw.choice(durations), draw.choice(shapes)
            step = int(draw.random() * (grid.t - duration + 1))
            row = int(draw.random() * (grid.h - height + 1))
            column = int(draw.random() * (grid.w - width + 1))
            hidden |= blocks[height, width] * stretches[duration] << ((step * grid.h + row) * grid.w + column)
        sizes.append(hidden.bit_count() * (geometry.grid.t // grid.t))
    return sorted(sizes)


def multiblock_faults(grid: PatchGrid, sets: Any = None) -> list[str]:
    """What is wrong with the mask sets; a fault begins with its place in the list ("sets.1.aspect=3 ...")."""
    names = {field.name: field.default is MISSING for field in fields(CuboidGeometry) if field.name != "grid"}
    if not isinstance(sets, Sequence) or isinstance(sets, str) or not sets:
        return [f"sets={_show(sets)} must be a list with at least one mask set, each with the keys {', '.join(names)}"]
    faults = []
    for number, values in enumerate(sets):
        if not isinstance(values, Mapping):
            faults.append(f"sets.{number}={values} must be a mask set, with the keys {', '.join(names)}")
            continue
        wrong = [
            f"sets.{number}.{key}={_show(value)} must go: a mask set has no {key!r}{suggestion(key, names)}"
            for key, value in values.items()
            if key not in names
        ]
        lacking = [name for name, is_required in names.items() if is_required and name not in values]
        wrong += [f"sets.{number}={values} must have the key {name}" for name in lacking]
        faults += wrong or [f"sets.{number}.{fault}" for fault in CuboidGeometry.of(grid, values).faults()]
    return faults


def show_grid(grid: PatchGrid) -> str:
    """As "14x14", or "8x14x14" of a clip."""
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
        return [f"ratio={ratio} must lie between 0 and 1: the share of tokens hidden from the context encoder"]
    if grid.num_context(ratio) < 1:
        return [f"ratio={ratio} leaves no context: it hides all {grid.num_tokens} tokens of the {show_grid(grid)} grid"]
    return []


def _range_faults(name: str, bounds: Any, upper: float) -> list[str]:
    """A range is two numbers, the smaller first, above 0 and at most `upper`."""
    is_pair = isinstance(bounds, Sequence) and len(bounds) == 2 and all(_is_number(bound) for bound in bounds)
    if is_pair and 0 < bounds[0] <= bounds[1] <= upper and bounds[1] < math.inf:
        return []
    limit = "" if upper == math.inf else f" and at most {upper:g}"
    return [f"{name}={_show(bounds)} must be two numbers, the smaller first, above 0{limit}"]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _show(value: Any) -> str:
    return str(list(value)) if isinstance(value, tuple | list) else str(value)
