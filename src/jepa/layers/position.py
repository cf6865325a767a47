"""Fixed position embeddings."""

from __future__ import annotations

import torch
from torch import Tensor

from jepa.types import PatchGrid


def sincos(grid: PatchGrid, width: int) -> Tensor:
    """-> float32 [N, width]: half of the width says the row, half the column, each by sines, then cosines.

    Transformer (Vaswani et al. 2017, section 3.5) in two dimensions, as in MAE and I-JEPA.
    """
    if grid.t != 1:
        raise ValueError(f"2-D positions describe one frame, the grid has {grid.t}: use num_frames=1")
    if width % 4:
        raise ValueError(f"2-D sin-cos positions need a width divisible by 4, got {width}: change embed_dim or width")
    n = torch.arange(grid.num_tokens)
    row, column = n // grid.w % grid.h, n % grid.w
    return torch.cat([waves(row, width // 2), waves(column, width // 2)], dim=1).float()


def waves(coordinate: Tensor, width: int) -> Tensor:
    """[N] -> float64 [N, width]: sines, then cosines, of wavelengths from 2 pi to 10000 * 2 pi."""
    frequency = 10000.0 ** -(torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    angle = coordinate.double()[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)
