"""Mask tokens and context through a narrow transformer (I-JEPA, Assran et al. 2023, section 3)."""

from __future__ import annotations

import torch
from timm.layers.norm import LayerNorm
from torch import Tensor, nn

from jepa.layers.attention import block_bias, cached_block_bias, compute_dtype
from jepa.layers.init import STD, init_weights
from jepa.layers.position import sincos
from jepa.layers.transformer import check_sizes, make_blocks
from jepa.types import Masks, PatchGrid


class TransformerPredictor(nn.Module):
    """Predicts each target block from the context, never from another block.

    `joint` runs one sequence, context | block 1 | ... | block M, in which the context sees only itself and a block
    sees the context and itself. Otherwise the context is repeated for each block and also sees that block's mask
    tokens, as in the reference: the same task, a slightly different function, and more work.
    """

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
        joint: bool = True,
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
        self.joint = joint
        self.embed = nn.Linear(embed_dim, width)
        self.mask_token = nn.Parameter(torch.empty(width))
        self.register_buffer("positions", sincos(grid, width), persistent=False)  # follows from the sizes
        self.blocks = make_blocks(width=width, depth=depth, num_heads=num_heads, mlp_ratio=mlp_ratio)
        self.norm = LayerNorm(width)
        self.project = nn.Linear(width, embed_dim)
        nn.init.trunc_normal_(self.mask_token, std=STD)
        init_weights(self, self.blocks)

    def forward(self, context: Tensor, masks: Masks) -> Tensor:
        """[B, K, D] -> [B, M, J, D]"""
        context = self.embed(context) + self.positions[masks.context]
        queries = self.mask_token + self.positions[masks.targets]
        predicted = self._joint(context, queries) if self.joint else self._apart(context, queries)
        return self.project(self.norm(predicted))

    def _joint(self, context: Tensor, queries: Tensor) -> Tensor:
        """[B, K, width], [B, M, J, width] -> [B, M, J, width] in one pass"""
        num_context, (num_blocks, block_size) = context.shape[1], queries.shape[1:3]
        tokens = torch.cat([context, queries.flatten(1, 2)], dim=1)
        bias = block_bias if torch.compiler.is_compiling() else cached_block_bias
        who_sees_whom = bias(num_context, num_blocks, block_size, tokens.device, compute_dtype(tokens))
        for block in self.blocks:
            tokens = block(tokens, attn_mask=who_sees_whom)
        return tokens[:, num_context:].unflatten(1, (num_blocks, block_size))

    def _apart(self, context: Tensor, queries: Tensor) -> Tensor:
        """[B, K, width], [B, M, J, width] -> [B, M, J, width] with a copy of the context for each block"""
        num_context, num_blocks = context.shape[1], queries.shape[1]
        tokens = torch.cat([context.repeat_interleave(num_blocks, dim=0), queries.flatten(0, 1)], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        return tokens[:, num_context:].unflatten(0, (-1, num_blocks))
