"""Random masking: a share of the tokens, wherever they lie, is hidden and predicted (MAE, section 3)."""

import torch
from torch import Tensor

from jepa.masks.geometry import random_faults
from jepa.masks.sampling import smallest, uniform_rows
from jepa.types import Masks, PatchGrid


class RandomMasker:
    """All hidden tokens are one target block: targets [B, 1, N - K]."""

    faults = "jepa.masks.geometry.random_faults"

    def __init__(self, *, grid: PatchGrid, ratio: float = 0.75):
        if faults := random_faults(grid, ratio):
            raise ValueError("; ".join(faults))
        self.num_tokens = grid.num_tokens
        self.num_context = grid.num_context(ratio)

    def __call__(self, batch_size: int, generator: torch.Generator, rows: Tensor | None = None) -> Masks:
        keys = uniform_rows(batch_size, self.num_tokens, generator, rows)
        context = smallest(keys, self.num_context)
        hidden = smallest(keys.scatter(1, context, 2.0), self.num_tokens - self.num_context)
        return Masks(context, hidden.unsqueeze(1))
