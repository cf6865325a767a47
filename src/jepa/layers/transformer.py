"""The transformer blocks of encoders and predictors: timm's pre-norm blocks with optional rotary positions."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from timm.layers.norm import LayerNorm
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from jepa.layers.attention import SelfAttention


class TrunkBlock(Block):
    """timm's block that passes `rope` and `prefix` to its attention."""

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        rope: Tensor | None = None,
        prefix: int = 0,
    ) -> Tensor:
        """[B, S, D] -> [B, S, D]"""
        if rope is None and not prefix:
            return super().forward(x, attn_mask, is_causal)
        x = x + self.drop_path1(self.attn(self.norm1(x), attn_mask, rope=rope, prefix=prefix))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


def make_blocks(
    width: int, depth: int, num_heads: int, mlp_ratio: float, *, drop_path: float = 0.0, norm_eps: float = 1e-6
) -> nn.ModuleList:
    """`depth` blocks [B, N, width] -> [B, N, width]; the drop path rate grows linearly from 0 to `drop_path`."""
    return nn.ModuleList(
        TrunkBlock(
            width,
            num_heads,
            mlp_ratio=mlp_ratio,
            qkv_bias=True,
            norm_layer=partial(LayerNorm, eps=norm_eps),  # pyright: ignore[reportArgumentType]
            drop_path=drop_path * number / max(depth - 1, 1),
            attn_layer=SelfAttention,
        )
        for number in range(depth)
    )


def run_blocks(
    blocks: Iterable[nn.Module],
    tokens: Tensor,
    *,
    mask: Tensor | None = None,
    rope: Tensor | None = None,
    prefix: int = 0,
    checkpointed: bool = False,
) -> Tensor:
    """[B, S, D] -> [B, S, D]; `checkpointed` recomputes activations in the backward instead of storing them."""
    for block in blocks:
        if checkpointed and torch.is_grad_enabled():
            tokens = checkpoint(block, tokens, mask, rope=rope, prefix=prefix, use_reentrant=False)
        else:
            tokens = block(tokens, mask, rope=rope, prefix=prefix)
    return tokens


def check_sizes(width: int, num_heads: int, mlp_ratio: float, *, width_key: str, heads_key: str) -> None:
    """Raises ValueError for impossible sizes; `width_key` and `heads_key` are the keys to change."""
    if width % num_heads:
        raise ValueError(f"{width_key}={width} is not divisible by {heads_key}={num_heads}: change one of them")
    if int(width * mlp_ratio) < 1:
        raise ValueError(f"mlp_ratio={mlp_ratio} leaves no hidden unit at {width_key}={width}")
