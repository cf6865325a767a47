"""Tube masking: the same random patches are hidden in every frame (VideoMAE, Tong et al. 2022, section 3.3)."""

import torch
from torch import Tensor

from jepa.masks.geometry import tube_faults
from jepa.masks.sampling import repeat_over_time, smallest_and_largest, uniform_rows
from jepa.types import Masks, PatchGrid


class TubeMasker:
    """All hidden tokens are one target block: targets [B, 1, N - K]; K and N - K are multiples of the time steps."""

    faults = "jepa.masks.geometry.tube_faults"

    def __init__(self, *, grid: PatchGrid, ratio: float = 0.75):
        if faults := tube_faults(grid, ratio):
            raise ValueError("; ".join(faults))
        self.grid, self.frame = grid, PatchGrid(1, grid.h, grid.w)
        self.num_visible = self.frame.num_context(ratio)
        self.num_context = self.num_visible * grid.t

    def __call__(self, batch_size: int, generator: torch.Generator, rows: Tensor | None = None) -> Masks:
        num_patches = self.frame.num_tokens
        scores = uniform_rows(batch_size, num_patches, generator, rows)
        visible, hidden = smallest_and_largest(scores, self.num_visible, num_patches - self.num_visible)
        return Masks(visible, hidden.unsqueeze(1)).map(lambda patches: repeat_over_time(patches, self.grid))
