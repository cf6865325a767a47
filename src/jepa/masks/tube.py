"""Tube masking: the same random patches are hidden in every frame (VideoMAE, Tong et al. 2022, section 3.3)."""

import torch
from torch import Tensor

from jepa.masks.geometry import tube_faults
from jepa.masks.sampling import repeat_over_time, smallest, uniform_rows
from jepa.types import Masks, PatchGrid


class TubeMasker:
    """All hidden tokens are one target block: targets [B, 1, N - K]; K and N - K are multiples of the time steps."""

    faults = "jepa.masks.geometry.tube_faults"

    def __init__(self, *, grid: PatchGrid, ratio: float = 0.75):
        if faults := tube_faults(grid, ratio):
            raise ValueError("; ".join(faults))
        self.grid = grid
        self.num_patches = grid.h * grid.w
        self.num_seen = PatchGrid(1, grid.h, grid.w).num_context(ratio)
        self.num_context = self.num_seen * grid.t

    def __call__(self, batch_size: int, generator: torch.Generator, rows: Tensor | None = None) -> Masks:
        keys = uniform_rows(batch_size, self.num_patches, generator, rows)
        seen = smallest(keys, self.num_seen)
        hidden = smallest(keys.scatter(1, seen, 2.0), self.num_patches - self.num_seen)
        return Masks(repeat_over_time(seen, self.grid), repeat_over_time(hidden, self.grid).unsqueeze(1))
