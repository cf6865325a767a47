"""No mask: every token is seen and none is to be predicted, for objectives that compare views or whole images."""

import torch

from jepa.types import Masks, PatchGrid


class NoMask:
    """Context [B, N], targets [B, 0, 0]; draws nothing from the generator."""

    def __init__(self, *, grid: PatchGrid):
        self.num_tokens = grid.num_tokens

    def __call__(self, batch_size: int, generator: torch.Generator) -> Masks:
        context = torch.arange(self.num_tokens).repeat(batch_size, 1)
        return Masks(context, torch.empty(batch_size, 0, 0, dtype=torch.long))
