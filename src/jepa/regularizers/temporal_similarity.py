"""Temporal similarity of EB-JEPA: latents of consecutive time steps should be close."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from jepa.regularizers.pooling import mean_counted, pool_steps
from jepa.types import Latents, NonNegative


class TemporalSimilarity(nn.Module):
    """Mean squared difference, over D, of the pooled latents of consecutive time steps of the grid.

    A pair counts if the sample has tokens of both steps; without such pairs, e.g. for images, the penalty is 0.
    """

    rules = ("jepa.regularizers.rules.temporal_similarity",)

    def __init__(self, *, of: Literal["context", "predicted"] = "context", weight: NonNegative = 1.0) -> None:
        super().__init__()
        self.of = of
        self.weight = weight

    def forward(self, latents: Latents) -> tuple[Tensor, dict[str, Tensor]]:
        """-> float32 scalar, and the unweighted distance, detached"""
        with torch.autocast(latents.context.device.type, enabled=False):
            steps, has_tokens = pool_steps(latents, self.of)  # [B, T, D] and [B, T]
            squares = (steps[:, 1:] - steps[:, :-1]).square().mean(dim=-1)  # [B, T - 1]
            counts = (has_tokens[:, 1:] & has_tokens[:, :-1]).to(squares.dtype)
            distance = mean_counted(squares, counts)
        return self.weight * distance, {"distance": distance.detach()}
