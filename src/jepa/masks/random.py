"""Random masking: a random share of the tokens is hidden and predicted (MAE, section 3)."""

import torch
from torch import Tensor

from jepa.masks.geometry import random_faults
from jepa.masks.sampling import smallest_and_largest, uniform_rows
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
        scores = uniform_rows(batch_size, self.num_tokens, generator, rows)
        context, hidden = smallest_and_largest(scores, self.num_context, self.num_tokens - self.num_context)
        return Masks(context, hidden.unsqueeze(1))
