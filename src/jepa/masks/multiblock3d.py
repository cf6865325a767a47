"""Multi-block masking of clips with several mask sets (V-JEPA, Bardes et al. 2024, section 3.2 and appendix)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from jepa.masks.geometry import CuboidGeometry, multiblock_faults
from jepa.masks.sampling import smallest_and_largest, uniform_rows
from jepa.types import Masks, MaskSets, PatchGrid

ATTEMPTS = 2
"""Placements drawn for each sample; the first whose union has J tokens and leaves K is taken."""


class MultiBlock3DMasker:
    """In each mask set the union of the blocks is the target [B, 1, J] and what is around them the context [B, K].

    `sets` holds one mapping for each mask set: `num_blocks`, `spatial_scale`, `aspect` and `temporal_scale`. Scale,
    aspect and place are drawn for each block of each sample; K and J follow from the configuration alone
    (`CuboidGeometry.counts`), and the surplus is dropped at random over all of space and time.
    """

    faults = "jepa.masks.geometry.multiblock_faults"

    def __init__(self, *, grid: PatchGrid, sets: Sequence[Mapping[str, Any]]):
        if faults := multiblock_faults(grid, sets):
            raise ValueError("; ".join(faults))
        self.samplers = [_CuboidSampler(CuboidGeometry.of(grid, values)) for values in sets]
        self.num_sets = len(sets)
        self.num_tokens = grid.num_tokens

    def __call__(self, batch_size: int, generator: torch.Generator, rows: Tensor | None = None) -> MaskSets:
        """Draws one row of numbers for each sample, of which `rows` [b], ascending, become masks; without them all."""
        sizes = [sampler.num_places for sampler in self.samplers]
        draws = uniform_rows(batch_size, self.num_tokens + sum(sizes), generator, rows)
        keys, *places = draws.split([self.num_tokens, *sizes], dim=1)
        return MaskSets([sampler(keys, part) for sampler, part in zip(self.samplers, places, strict=True)])


class _CuboidSampler:
    """Turns random numbers into one mask set; which tokens are surplus is decided by keys that the sets share."""

    def __init__(self, geometry: CuboidGeometry) -> None:
        self.grid = geometry.grid
        self.drawn = geometry.drawn_grid()
        self.shapes = torch.tensor(geometry.shapes(), dtype=torch.float32)  # [number of shapes, 2]
        self.durations = torch.tensor(geometry.durations(), dtype=torch.float32)
        self.sides = torch.tensor([self.drawn.t, self.drawn.h, self.drawn.w], dtype=torch.float32)
        self.num_context, self.num_targets = geometry.counts()
        self.tries = (ATTEMPTS, geometry.num_blocks, 5)
        self.num_places = ATTEMPTS * geometry.num_blocks * 5

    def __call__(self, keys: Tensor, places: Tensor) -> Masks:
        """[B, N], [B, num_places], all in [0, 1) -> [B, K], [B, 1, J]"""
        hidden = self._first_fit(self._unions(places.unflatten(1, self.tries)))
        # From the two ends of one order, hidden tokens before the others: what lacks on one side comes from the other.
        order = keys.unflatten(1, (-1, hidden.shape[1])) + ~hidden.unsqueeze(1)
        targets, context = smallest_and_largest(order.flatten(1), self.num_targets, self.num_context)
        return Masks(context, targets.unsqueeze(1))

    def _first_fit(self, hidden: Tensor) -> Tensor:
        """[B, attempts, n] -> [B, n]: of each sample the first union that has J tokens and leaves K, if any."""
        size = hidden.sum(2) * (self.grid.t // self.drawn.t)
        fits = (size >= self.num_targets) & (size <= self.grid.num_tokens - self.num_context)
        return hidden[torch.arange(len(fits)), fits.byte().argmax(1)]

    def _unions(self, draws: Tensor) -> Tensor:
        """[..., blocks, 5] -> [..., n] bool: the tokens of the drawn grid that lie in any of the blocks."""
        steps = self.durations[(draws[..., :1] * len(self.durations)).long()]
        lengths = torch.cat([steps, self.shapes[(draws[..., 1] * len(self.shapes)).long()]], dim=-1)  # [..., blocks, 3]
        start = (draws[..., 2:] * (self.sides - lengths + 1)).floor_().unsqueeze(-1)  # anywhere on the grid
        place = torch.arange(max(self.drawn.t, self.drawn.h, self.drawn.w), dtype=torch.float32) - start
        inside = (place >= 0) & (place < lengths.unsqueeze(-1))
        time, rows, columns = inside.float().unbind(-2)  # [..., blocks, longest side] each
        lines = (time[..., : self.drawn.t, None] * rows[..., None, : self.drawn.h]).flatten(-2)  # [..., blocks, t * h]
        return (lines.mT @ columns[..., : self.drawn.w] > 0).flatten(-2)
