"""Tube masking: the same random patches are hidden in every frame (VideoMAE, Tong et al. 2022, section 3.3)."""

import torch
from torch import Tensor

from jepa.masks.random import RandomMasker
from jepa.masks.sampling import repeat_over_time
from jepa.types import Masks, PatchGrid


class TubeMasker:
    """All hidden tokens are one target block: targets [B, 1, N - K]; K and N - K are multiples of the time steps."""

    faults = "jepa.masks.geometry.tube_faults"

    def __init__(self, *, grid: PatchGrid, ratio: float = 0.75):
        self.grid = grid
        self.frame_masker = RandomMasker(grid=PatchGrid(1, grid.h, grid.w), ratio=ratio)
        self.num_context = self.frame_masker.num_context * grid.t

    def __call__(self, batch_size: int, generator: torch.Generator, rows: Tensor | None = None) -> Masks:
        frame_masks = self.frame_masker(batch_size, generator, rows)
        return frame_masks.map(lambda patches: repeat_over_time(patches, self.grid))
