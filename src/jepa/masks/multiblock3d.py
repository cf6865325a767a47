"""Multi-block masking of clips with several mask sets (V-JEPA, Bardes et al. 2024, section 3.2 and appendix)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from jepa.masks.geometry import CuboidGeometry, multiblock_faults
from jepa.masks.sampling import smallest_and_largest, uniform_rows
from jepa.types import Masks, MaskSets, PatchGrid

ATTEMPTS = 2
"""Number of placements drawn for each sample; the first whose union has J tokens and leaves K is used."""


class MultiBlock3DMasker:
    """In each mask set the union of the blocks is the target [B, 1, J] and the rest of the grid the context [B, K].

    `sets` holds one mapping for each mask set: `num_blocks`, `spatial_scale`, `aspect` and `temporal_scale`. Scale,
    aspect and position are drawn for each block of each sample. K and J follow from the configuration alone
    (`CuboidGeometry.counts`); surplus tokens are dropped at random over space and time.
    """

    faults = "jepa.masks.geometry.multiblock_faults"

    def __init__(self, *, grid: PatchGrid, sets: Sequence[Mapping[str, Any]]):
        if faults := multiblock_faults(grid, sets):
            raise ValueError("; ".join(faults))
        self.samplers = [_CuboidSampler(CuboidGeometry.of(grid, values)) for values in sets]
        self.num_sets = len(sets)
        self.num_tokens = grid.num_tokens

    def __call__(self, batch_size: int, generator: torch.Generator, rows: Tensor | None = None) -> MaskSets:
        """Draws one row of numbers for each sample; returns the masks of `rows` [b] (default: all)."""
        sizes = [sampler.num_draws for sampler in self.samplers]
        numbers = uniform_rows(batch_size, self.num_tokens + sum(sizes), generator, rows)
        scores, *draws = numbers.split([self.num_tokens, *sizes], dim=1)
        return MaskSets([sampler(scores, part) for sampler, part in zip(self.samplers, draws, strict=True)])


class _CuboidSampler:
    """Turns random numbers into one mask set; the sets share the scores by which surplus tokens are dropped."""

    def __init__(self, geometry: CuboidGeometry) -> None:
        self.grid = geometry.grid
        self.block_grid = geometry.block_grid()
        self.shapes = torch.tensor(geometry.shapes(), dtype=torch.float32)  # [number of shapes, 2]
        self.durations = torch.tensor(geometry.durations(), dtype=torch.float32)
        self.sides = torch.tensor([self.block_grid.t, self.block_grid.h, self.block_grid.w], dtype=torch.float32)
        self.num_context, self.num_targets = geometry.counts()
        self.num_blocks = geometry.num_blocks
        self.num_draws = ATTEMPTS * geometry.num_blocks * 5

    def __call__(self, scores: Tensor, draws: Tensor) -> Masks:
        """[B, N], [B, num_draws], all in [0, 1) -> [B, K], [B, 1, J]"""
        hidden = self._first_fit(self._unions(draws.unflatten(1, (ATTEMPTS, self.num_blocks, 5))))
        # Targets and context are the two ends of one order, hidden tokens first: if one side has too few, it gets
        # tokens of the other.
        order = scores.unflatten(1, (-1, hidden.shape[1])) + ~hidden.unsqueeze(1)
        targets, context = smallest_and_largest(order.flatten(1), self.num_targets, self.num_context)
        return Masks(context, targets.unsqueeze(1))

    def _first_fit(self, hidden: Tensor) -> Tensor:
        """[B, attempts, n] -> [B, n]: of each sample the first union that has J tokens and leaves K; else the first."""
        size = hidden.sum(2) * (self.grid.t // self.block_grid.t)
        fits = (size >= self.num_targets) & (size <= self.grid.num_tokens - self.num_context)
        return hidden[torch.arange(len(fits)), fits.byte().argmax(1)]

    def _unions(self, draws: Tensor) -> Tensor:
        """[..., blocks, 5] -> [..., n] bool: True for tokens of the block grid that lie in any of the blocks."""
        steps = self.durations[(draws[..., :1] * len(self.durations)).long()]
        lengths = torch.cat([steps, self.shapes[(draws[..., 1] * len(self.shapes)).long()]], dim=-1)  # [..., blocks, 3]
        start = (draws[..., 2:] * (self.sides - lengths + 1)).floor_().unsqueeze(-1)  # uniform
        offset = torch.arange(int(self.sides.max()), dtype=torch.float32) - start  # [..., blocks, 3, longest side]
        inside = (offset >= 0) & (offset < lengths.unsqueeze(-1))
        grid, (time, rows, columns) = self.block_grid, inside.float().unbind(-2)  # 3 of [..., blocks, longest side]
        lines = (time[..., : grid.t, None] * rows[..., None, : grid.h]).flatten(-2)  # [..., blocks, t * h]
        return (lines.mT @ columns[..., : grid.w] > 0).flatten(-2)
