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
        self, *, grid: PatchGrid, embed_dim: int, num_heads: PositiveInt, num_mask_tokens: int = 1,
        width: PositiveInt = 384, depth: PositiveInt = 6, mlp_ratio: Positive = 4.0, joint: bool = True,
        position: Annotated[str, Literal["sincos", "rope", "vjepa2"]] = "sincos",
    ) -> None:  # fmt: skip
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
        self, context: Tensor, masks: Masks, grid: PatchGrid | None = None, mask_set: int = 0,
        predict_context: bool = False,
    ) -> Tensor:  # fmt: skip
        """[B, K, D] -> [B, M, J, D]; with `predict_context` (joint only) [B, K + M * J, D], the context first"""
        grid, targets, mask, prefix = grid or self.grid, masks.targets, None, 0
        num_context, (num_blocks, block_size) = context.shape[1], targets.shape[1:]
        context = self.positions.add(self.embed(context), grid, masks.context)
        queries = self.positions.add(self.mask_tokens[mask_set].expand(*targets.shape, -1), grid, targets)
        if self.joint:
            tokens = torch.cat([context, queries.flatten(1, 2)], dim=1)  # [B, K + M * J, width]
            positions = torch.cat([masks.context, targets.flatten(1)], dim=1)
            # The sequence of a clip is long: two attention calls without a mask are faster than one with it.
            prefix = num_context if num_blocks == 1 and grid.t > 1 else 0
            sizes = (num_context, num_blocks, block_size)
            mask = None if prefix else cached_table(block_bias, *sizes, tokens.device, compute_dtype(tokens))
        else:
            context, visible = (part.repeat_interleave(num_blocks, dim=0) for part in (context, masks.context))
            tokens = torch.cat([context, queries.flatten(0, 1)], dim=1)  # [B * M, K + J, width]
            positions = torch.cat([visible, targets.flatten(0, 1)], dim=1)
        rope = self.positions.rope(tokens, grid, positions)
        tokens = run_blocks(self.blocks, tokens, mask=mask, rope=rope, prefix=prefix)
        if predict_context:
            return self.project(self.norm(tokens))
        return self.project(self.norm(tokens[:, num_context:])).reshape(*targets.shape, -1)
