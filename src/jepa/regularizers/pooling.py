"""Latents averaged over tokens: of each sample, or of each time step of its clip."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from jepa.parallel.collectives import mean_over_ranks
from jepa.types import Latents


def pool_views(latents: Latents, of: str) -> Tensor:
    """-> float32 [b, V, D]: the mean token of each view of b samples, `local` views last

    If time steps are samples of their own (`frames_apart`), b is their number and V is 1.
    `of` is "context" for the latents of the context encoder, "predicted" for those of the predictor.
    """
    if latents.frames_apart:
        steps = latents.context.unflatten(1, (latents.grid.t, -1)) if of == "context" else latents.predicted
        return steps.float().mean(dim=2).flatten(0, 1)[:, None]  # [B T, 1, D]
    views = _tokens(latents, of).mean(dim=1).unflatten(0, (-1, latents.views))
    return views if latents.local is None else torch.cat([views, pool_views(latents.local, of)], dim=1)


def pool_steps(latents: Latents, of: str) -> tuple[Tensor, Tensor]:
    """-> float32 [B, T, D] and bool [B, T]: the mean token of each time step, and whether the step has tokens"""
    tokens, grid = _tokens(latents, of), latents.grid
    positions = latents.masks.context if of == "context" else latents.masks.targets.flatten(1)  # [B, n]
    member = F.one_hot(positions // (grid.h * grid.w), grid.t).mT.to(tokens.dtype)  # [B, T, n]
    count = member.sum(dim=-1, keepdim=True)
    return member @ tokens / count.clamp(min=1), count[..., 0] > 0


def mean_counted(values: Tensor, counts: Tensor) -> Tensor:
    """Two float tensors of one shape -> mean over all ranks of the values with count 1; 0 if there are none"""
    total, count = mean_over_ranks(torch.stack([(values * counts).sum(), counts.sum()]))
    return total / count.clamp(min=torch.finfo(count.dtype).tiny)


def _tokens(latents: Latents, of: str) -> Tensor:
    """-> float32 [B, n, D]"""
    return latents.context.float() if of == "context" else latents.predicted.float().flatten(1, 2)
