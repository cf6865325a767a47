"""The transformer blocks of encoders and predictors: timm's pre-norm blocks with optional rotary positions."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from timm.layers.norm import LayerNorm
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from jepa.layers.attention import SelfAttention


class TrunkBlock(Block):
    """timm's block that passes `rope` and `prefix` to its attention."""

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, rope: Tensor | None = None,
        prefix: int = 0,
    ) -> Tensor:  # fmt: skip
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
    blocks: Iterable[nn.Module], tokens: Tensor, *, mask: Tensor | None = None, rope: Tensor | None = None,
    prefix: int = 0, checkpointed: bool = False,
) -> Tensor:  # fmt: skip
    """[B, S, D] -> [B, S, D]; `checkpointed` recomputes activations in the backward instead of storing them."""
    for block in blocks:
        if checkpointed and torch.is_grad_enabled():
            tokens = checkpoint(block, tokens, mask, rope=rope, prefix=prefix, use_reentrant=False)
        else:
            tokens = block(tokens, mask, rope=rope, prefix=prefix)
    return tokens


def record_outputs(encoder: Any, clips: Tensor, num: int) -> list[Tensor]:
    """The outputs of the last `num` blocks of an encoder on clips, as the blocks return them."""
    outputs: list[Tensor] = []
    with ExitStack() as stack:
        for block in encoder.blocks[-num:]:
            stack.callback(block.register_forward_hook(lambda *call: outputs.append(call[-1])).remove)
        encoder(clips)
    return outputs


def last_layers(encoder: Any, clips: Tensor, num: int) -> list[Tensor]:
    """[B, C, T, H, W] -> [B, N, D] for each of the last `num` blocks: their outputs without prefix tokens"""
    prefix = getattr(encoder, "num_prefix_tokens", 0)
    outputs = record_outputs(encoder, clips, num)  # [B * frames encoded apart, prefix + n, D]
    return [tokens[:, prefix:].reshape(len(clips), -1, tokens.shape[-1]) for tokens in outputs]


def check_sizes(width: int, num_heads: int, mlp_ratio: float, *, width_key: str, heads_key: str) -> None:
    """Raises ValueError for impossible sizes; `width_key` and `heads_key` are the keys to change."""
    if width % num_heads:
        raise ValueError(f"{width_key}={width} is not divisible by {heads_key}={num_heads}: change one of them")
    if int(width * mlp_ratio) < 1:
        raise ValueError(f"mlp_ratio={mlp_ratio} leaves no hidden unit at {width_key}={width}")
