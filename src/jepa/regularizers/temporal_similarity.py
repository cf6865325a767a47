"""Latents that change slowly: what follows each other in a clip should be close (temporal similarity of EB-JEPA)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from jepa.parallel.collectives import mean_over_ranks
from jepa.regularizers.pooling import pool_steps
from jepa.types import Latents, NonNegative


class TemporalSimilarity(nn.Module):
    """The mean squared difference, over D, of the pooled latents of consecutive time steps of the grid.

    A pair of steps counts where a sample has tokens of both; a batch without such pairs, as of images, costs nothing.
    """

    rules = ("jepa.regularizers.rules.temporal_similarity",)

    def __init__(self, *, of: Literal["context", "predicted"] = "context", weight: NonNegative = 1.0) -> None:
        super().__init__()
        self.of = of
        self.weight = weight

    def forward(self, latents: Latents) -> tuple[Tensor, dict[str, Tensor]]:
        """-> float32 scalar, and the distance before weighting, detached"""
        with torch.autocast(latents.context.device.type, enabled=False):
            steps, is_there = pool_steps(latents, self.of)  # [B, T, D] and [B, T]
            squares = (steps[:, 1:] - steps[:, :-1]).square().mean(dim=-1)  # [B, T - 1]
            counts = (is_there[:, 1:] & is_there[:, :-1]).to(squares.dtype)
            total, count = mean_over_ranks(torch.stack([(squares * counts).sum(), counts.sum()]))
            distance = total / count.clamp(min=torch.finfo(count.dtype).tiny)
        return self.weight * distance, {"distance": distance.detach()}
