"""Predictor by cross-attention: mask tokens attend to the context only (CrossMAE, Fu et al. 2024)."""

from __future__ import annotations

import torch
from timm.layers.norm import LayerNorm
from torch import Tensor, nn

from jepa.layers.attention import CrossAttentionBlock
from jepa.layers.init import STD, init_weights
from jepa.layers.position import Positions
from jepa.layers.transformer import check_sizes
from jepa.types import Masks, PatchGrid, Positive, PositiveInt


class CrossAttentionPredictor(nn.Module):
    """Predicts every target token apart: queries attend to the context, never to each other.

    Each of several mask sets has its own mask token (V-JEPA, Bardes et al. 2024).
    """

    def __init__(
        self, *, grid: PatchGrid, embed_dim: int, num_heads: PositiveInt, num_mask_tokens: int = 1,
        width: PositiveInt = 384, depth: PositiveInt = 6, mlp_ratio: Positive = 4.0,
    ) -> None:  # fmt: skip
        super().__init__()
        check_sizes(width, num_heads, mlp_ratio, width_key="predictor.width", heads_key="predictor.num_heads")
        self.grid = grid
        self.embed = nn.Linear(embed_dim, width)
        self.context_norm = LayerNorm(width)
        self.mask_tokens = nn.Parameter(torch.empty(num_mask_tokens, width))
        self.positions = Positions(grid=grid, width=width)
        self.blocks = nn.ModuleList(
            CrossAttentionBlock(width=width, num_heads=num_heads, mlp_ratio=mlp_ratio) for _ in range(depth)
        )
        self.norm = LayerNorm(width)
        self.project = nn.Linear(width, embed_dim)
        nn.init.trunc_normal_(self.mask_tokens, std=STD)
        init_weights(self, self.blocks)

    def forward(self, context: Tensor, masks: Masks, grid: PatchGrid | None = None, mask_set: int = 0) -> Tensor:
        """[B, K, D] -> [B, M, J, D]"""
        grid = grid or self.grid
        context = self.context_norm(self.positions.add(self.embed(context), grid, masks.context))
        queries = self.positions.add(self.mask_tokens[mask_set], grid, masks.targets).flatten(1, 2)
        for block in self.blocks:
            queries = block(queries, context)
        return self.project(self.norm(queries)).unflatten(1, masks.targets.shape[1:])
