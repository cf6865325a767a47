"""Sizes of masks, worked out from a patch grid without torch, so that a configuration can be refused in a moment.

For the check of a configuration: `mask_faults(node, grid)` takes the plain dict of a `mask` node (with its `_target_`)
and returns every fault as a sentence that begins with the key at fault ("ratio=0.999 ..."), or nothing when the masker
can be built. The constructors of the maskers raise the same sentences.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from jepa.types import PatchGrid

LEVELS = 33
"""Scale and aspect each take this many evenly spaced values, so that the possible block shapes are a finite list."""

Shape = tuple[int, int]


def mask_faults(node: Mapping[str, Any], grid: PatchGrid) -> list[str]:
    """What keeps the masker of a `mask` node from being built on this grid."""
    kind = str(node.get("_target_", "")).rpartition(".")[2]
    if kind == "RandomMasker":
        return random_faults(grid, node.get("ratio", 0.75))
    if kind == "BlockMasker":
        names = {field.name for field in fields(BlockGeometry)} - {"grid"}
        return BlockGeometry(grid=grid, **{name: value for name, value in node.items() if name in names}).faults()
    return []


def random_faults(grid: PatchGrid, ratio: Any) -> list[str]:
    if faults := _ratio_faults(ratio, grid):
        return faults
    if grid.num_context(ratio) == grid.num_tokens:
        return [f"ratio={ratio} leaves no target: it hides none of the {grid.num_tokens} tokens"]
    return []


def block_shape(grid: PatchGrid, scale: float, aspect: float) -> Shape:
    """Height and width in tokens of a block that covers the share `scale`; an aspect too long for the grid is bent."""
    area = scale * grid.h * grid.w
    fitting = min(max(aspect, area / grid.w**2), grid.h**2 / area)
    return max(1, round(math.sqrt(area * fitting))), max(1, round(math.sqrt(area / fitting)))


@dataclass(frozen=True, kw_only=True)
class BlockGeometry:
    """Block shapes and token counts of multi-block masking (I-JEPA, section 3) on one grid."""

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
        return min(self._free_tokens(quantile=0.1), self.grid.num_tokens - self._max_target())

    def faults(self) -> list[str]:
        """Why these blocks cannot be drawn; empty when every draw can give K context tokens beside its targets."""
        faults = [] if self.ratio is None else _ratio_faults(self.ratio, self.grid)
        for name, upper in (("target_scale", 1.0), ("target_aspect", math.inf), ("context_scale", 1.0)):
            faults += _range_faults(name, getattr(self, name), upper)
        if not isinstance(self.num_targets, int) or self.num_targets < 1:
            faults.append(f"num_targets={self.num_targets} must be a whole number of at least 1")
        if self.grid.t > 1:
            faults.append(f"blocks are masked in images, the grid has {self.grid.t} steps in time: set num_frames=1")
        return faults or self._count_faults()

    def _count_faults(self) -> list[str]:
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
        return max(height * width for height, width in self.target_shapes())

    def _free_tokens(self, quantile: float, draws: int = 2000) -> int:
        """Quantile of the tokens of a context block outside its targets, over a fixed set of draws."""
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
        """A block somewhere on the grid, as an integer with one bit for each token."""
        (height, width), columns = shape, self.grid.w
        row = (1 << width) - 1
        block = sum(row << (columns * line) for line in range(height))
        return block << (columns * draw.randint(0, self.grid.h - height) + draw.randint(0, columns - width))


def _levels(bounds: Sequence[float]) -> list[float]:
    low, high = bounds
    return [low + (high - low) * level / (LEVELS - 1) for level in range(LEVELS)]


def _ratio_faults(ratio: Any, grid: PatchGrid) -> list[str]:
    if not _is_number(ratio) or not 0 < ratio < 1:
        return [f"ratio={ratio} must lie between 0 and 1: the share of tokens hidden from the context encoder"]
    if grid.num_context(ratio) < 1:
        return [f"ratio={ratio} leaves no context: it hides all {grid.num_tokens} tokens of the {grid.h}x{grid.w} grid"]
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
