"""Latents of one mask set, averaged over tokens: for each sample, or for each of its time steps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from jepa.types import Latents


def pool(latents: Latents, of: str) -> Tensor:
    """Latents `of` the "context" encoder, or "predicted" by the predictor -> float32 [B, D]"""
    return _tokens(latents, of).mean(dim=1)


def pool_views(latents: Latents, of: str) -> Tensor:
    """-> float32 [b, V, D] of the b samples: their `views`, then those of smaller crops, where there are any."""
    views = pool(latents, of).unflatten(0, (-1, latents.views))
    return views if latents.local is None else torch.cat([views, pool_views(latents.local, of)], dim=1)


def pool_steps(latents: Latents, of: str) -> tuple[Tensor, Tensor]:
    """-> float32 [B, T, D] and bool [B, T]: of each time step of the grid, and whether there is a token of it."""
    tokens, grid = _tokens(latents, of), latents.grid
    places = latents.masks.context if of == "context" else latents.masks.targets.flatten(1)  # [B, n]
    member = F.one_hot(places // (grid.h * grid.w), grid.t).mT.to(tokens.dtype)  # [B, T, n]
    count = member.sum(dim=-1, keepdim=True)
    return member @ tokens / count.clamp(min=1), count[..., 0] > 0


def _tokens(latents: Latents, of: str) -> Tensor:
    """-> float32 [B, n, D]"""
    return latents.context.float() if of == "context" else latents.predicted.float().flatten(1, 2)
