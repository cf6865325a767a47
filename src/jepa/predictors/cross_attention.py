"""Mask tokens that only read the context: the cheap predictor."""

from __future__ import annotations

import torch
from timm.layers.norm import LayerNorm
from torch import Tensor, nn

from jepa.layers.attention import CrossAttentionBlock
from jepa.layers.init import STD, init_weights
from jepa.layers.position import sincos
from jepa.layers.transformer import check_sizes
from jepa.types import Masks, PatchGrid


class CrossAttentionPredictor(nn.Module):
    """Predicts every target token apart: queries read the context and never meet (CrossMAE, Fu et al. 2024)."""

    positions: Tensor

    def __init__(
        self,
        *,
        grid: PatchGrid,
        embed_dim: int,
        num_heads: int,
        width: int = 384,
        depth: int = 6,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        check_sizes(
            width=width,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            width_key="predictor.width",
            heads_key="predictor.num_heads",
        )
        self.embed = nn.Linear(embed_dim, width)
        self.context_norm = LayerNorm(width)
        self.mask_token = nn.Parameter(torch.empty(width))
        self.register_buffer("positions", sincos(grid, width), persistent=False)  # follows from the sizes
        self.blocks = nn.ModuleList(
            CrossAttentionBlock(width=width, num_heads=num_heads, mlp_ratio=mlp_ratio) for _ in range(depth)
        )
        self.norm = LayerNorm(width)
        self.project = nn.Linear(width, embed_dim)
        nn.init.trunc_normal_(self.mask_token, std=STD)
        init_weights(self, self.blocks)

    def forward(self, context: Tensor, masks: Masks) -> Tensor:
        """[B, K, D] -> [B, M, J, D]"""
        context = self.context_norm(self.embed(context) + self.positions[masks.context])
        queries = (self.mask_token + self.positions[masks.targets]).flatten(1, 2)
        for block in self.blocks:
            queries = block(queries, context)
        return self.project(self.norm(queries)).unflatten(1, masks.targets.shape[1:])
