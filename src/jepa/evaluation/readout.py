"""What a probe reads of an encoder's tokens: a vector for each sample."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from jepa.types import PatchGrid

NUM_LAYERS = 4
"""Largest number of last blocks that readout=layers takes."""
MAX_READ_TOKENS = 16
"""Largest number of tokens that readout=tokens puts side by side."""
READOUTS: dict[str, str] = {
    "mean": "averaged over the sample",
    "mean_std": "mean and standard deviation over the sample side by side",
    "steps": "averaged over each time step of the clip, the steps side by side",
    "grid2": "averaged over each quarter of the picture, the quarters side by side",
    "layers": "averaged over the sample",
    "tokens": f"side by side, neighbours averaged until at most {MAX_READ_TOKENS} are left",
    "cls": "of which the class token is taken",
}


def read_tokens(cls: Tensor | None, tokens: Tensor, readout: str, grid: PatchGrid) -> Tensor:
    """[b, t, D], [b, N, D] -> [b, d]"""
    if readout == "cls":
        assert cls is not None
        return cls.mean(1)
    if readout == "mean_std":
        return torch.cat([tokens.mean(1), tokens.std(1, correction=0)], dim=1)
    if readout == "steps":
        return tokens.unflatten(1, (grid.t, -1)).mean(2).flatten(1)
    if readout == "grid2":
        frames = tokens.mT.unflatten(2, (grid.t, grid.h, grid.w)).mean(2)  # [b, D, h, w]
        return F.adaptive_avg_pool2d(frames, 2).flatten(2).mT.flatten(1)
    if readout == "tokens":
        return pool_tokens(tokens, grid, MAX_READ_TOKENS).flatten(1)
    return tokens.mean(1)


def pool_tokens(tokens: Tensor, grid: PatchGrid, max_tokens: int) -> Tensor:
    """[b, N, D] -> [b, J, D] with J <= max_tokens: neighbours on the grid are averaged"""
    full, size = (grid.t, grid.h, grid.w), coarse_grid(grid, max_tokens)
    if size == full:
        return tokens
    return F.adaptive_avg_pool3d(tokens.mT.unflatten(2, full), size).flatten(2).mT


def coarse_grid(grid: PatchGrid, max_tokens: int) -> tuple[int, int, int]:
    """Time, height and width, halved (rounded up) along the longest, space first, until at most `max_tokens` remain."""
    t, h, w = grid.t, grid.h, grid.w
    while t * h * w > max_tokens:
        if max(h, w) >= t:
            h, w = (h + 1) // 2, (w + 1) // 2
        else:
            t = (t + 1) // 2
    return t, h, w
