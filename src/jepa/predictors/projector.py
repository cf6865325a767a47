"""Projection head for view-based objectives (SimCLR, VICReg, LeJEPA); predicts no hidden tokens."""

from __future__ import annotations

from torch import Tensor, nn

from jepa.layers.batch_norm import BatchNorm
from jepa.layers.init import init_weights
from jepa.types import Masks, PatchGrid, PositiveInt


class Projector(nn.Module):
    """MLP with two hidden layers and batch norm on the mean token; regularisers compare its output as `predicted`.

    Features before such a head are better than those after it (SimCLR, Chen et al. 2020, section 4.2; VICReg, Bardes et
    al. 2022, section 4.2). Batch norm covers all ranks, and with `micro_batch_size` only a part of the batch.
    """

    predicts_tokens = False

    def __init__(self, *, embed_dim: int, hidden_dim: PositiveInt = 1024, output_dim: PositiveInt = 128) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(embed_dim, hidden_dim, bias=False), BatchNorm(hidden_dim), nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim, bias=False), BatchNorm(hidden_dim), nn.GELU(),
            nn.Linear(hidden_dim, output_dim),
        )  # fmt: skip
        init_weights(self, ())

    def forward(self, context: Tensor, masks: Masks, grid: PatchGrid | None = None, mask_set: int = 0) -> Tensor:
        """[B, K, D] -> [B, 1, 1, output_dim]"""
        return self.layers(context.mean(dim=1))[:, None, None]
