"""Predictor of I-JEPA: a narrow transformer on context and mask tokens (Assran et al. 2023, section 3)."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from timm.layers.norm import LayerNorm
from torch import Tensor, nn

from jepa.layers.attention import block_bias, compute_dtype
from jepa.layers.init import STD, init_weights
from jepa.layers.position import Positions, cached_table
from jepa.layers.transformer import check_sizes, make_blocks, run_blocks
from jepa.types import Masks, PatchGrid, Positive, PositiveInt


class TransformerPredictor(nn.Module):
    """Predicts each target block from the context, never from another block.

    `joint` runs one sequence, context | block 1 | ... | block M, in which the context attends to itself and a block to
    the context and itself. Otherwise, as in the reference, the context is repeated for each block and also attends to
    its mask tokens: a slightly different function and more work. Each of several mask sets has its own mask token
    (V-JEPA, Bardes et al. 2024).
    """

    def __init__(
        self,
        *,
        grid: PatchGrid,
        embed_dim: int,
        num_heads: PositiveInt,
        num_mask_tokens: int = 1,
        width: PositiveInt = 384,
        depth: PositiveInt = 6,
        mlp_ratio: Positive = 4.0,
        joint: bool = True,
        position: Annotated[str, Literal["sincos", "rope", "vjepa2"]] = "sincos",
    ) -> None:
        super().__init__()
        check_sizes(width, num_heads, mlp_ratio, width_key="predictor.width", heads_key="predictor.num_heads")
        self.grid = grid
        self.joint = joint
        self.embed = nn.Linear(embed_dim, width)
        self.mask_tokens = nn.Parameter(torch.empty(num_mask_tokens, width))
        self.positions = Positions(grid=grid, width=width, num_heads=num_heads, kind=position)
        self.blocks = make_blocks(width, depth, num_heads, mlp_ratio)
        self.norm = LayerNorm(width)
        self.project = nn.Linear(width, embed_dim)
        nn.init.trunc_normal_(self.mask_tokens, std=STD)
        init_weights(self, self.blocks)

    def forward(
        self,
        context: Tensor,
        masks: Masks,
        grid: PatchGrid | None = None,
        mask_set: int = 0,
        predict_context: bool = False,
    ) -> Tensor:
        """[B, K, D] -> [B, M, J, D]; with `predict_context` (joint only) [B, K + M * J, D], the context first"""
        grid = grid or self.grid
        context = self.positions.add(self.embed(context), grid, masks.context)
        queries = self.mask_tokens[mask_set].expand(*masks.targets.shape, -1)
        queries = self.positions.add(queries, grid, masks.targets)
        if not self.joint:
            return self.project(self.norm(self._apart(context, queries, masks, grid)))
        tokens = self._joint(context, queries, masks, grid)
        if predict_context:
            return self.project(self.norm(tokens))
        return self.project(self.norm(tokens[:, context.shape[1] :])).unflatten(1, masks.targets.shape[1:])

    def _joint(self, context: Tensor, queries: Tensor, masks: Masks, grid: PatchGrid) -> Tensor:
        """[B, K, width], [B, M, J, width] -> [B, K + M * J, width] in one pass"""
        num_context, (num_blocks, block_size) = context.shape[1], queries.shape[1:3]
        tokens = torch.cat([context, queries.flatten(1, 2)], dim=1)
        positions = torch.cat([masks.context, masks.targets.flatten(1)], dim=1)
        # The sequence of a clip is long: two attention calls without a mask are faster than one with it.
        prefix = num_context if num_blocks == 1 and grid.t > 1 else 0
        sizes = (num_context, num_blocks, block_size)
        mask = None if prefix else cached_table(block_bias, *sizes, tokens.device, compute_dtype(tokens))
        rope = self.positions.rope(tokens, grid, positions)
        return run_blocks(self.blocks, tokens, mask=mask, rope=rope, prefix=prefix)

    def _apart(self, context: Tensor, queries: Tensor, masks: Masks, grid: PatchGrid) -> Tensor:
        """[B, K, width], [B, M, J, width] -> [B, M, J, width] with a copy of the context for each block"""
        num_context, num_blocks = context.shape[1], queries.shape[1]
        tokens = torch.cat([context.repeat_interleave(num_blocks, dim=0), queries.flatten(0, 1)], dim=1)
        positions = torch.cat([masks.context.repeat_interleave(num_blocks, dim=0), masks.targets.flatten(0, 1)], dim=1)
        tokens = run_blocks(self.blocks, tokens, rope=self.positions.rope(tokens, grid, positions))
        return tokens[:, num_context:].unflatten(0, (-1, num_blocks))
