"""No mask: every token is context and none is a target, for objectives that compare views or whole images."""

import torch
from torch import Tensor

from jepa.types import Masks, PatchGrid


class NoMask:
    """Context [B, N], targets [B, 0, 0]; draws nothing from the generator."""

    hides_tokens = False

    def __init__(self, *, grid: PatchGrid):
        self.num_tokens = grid.num_tokens

    def __call__(self, batch_size: int, generator: torch.Generator, rows: Tensor | None = None) -> Masks:
        num_rows = batch_size if rows is None else len(rows)
        context = torch.arange(self.num_tokens).repeat(num_rows, 1)
        return Masks(context, torch.empty(num_rows, 0, 0, dtype=torch.long))
