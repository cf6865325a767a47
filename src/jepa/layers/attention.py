"""Which attention kernel runs, who sees whom, and the cross-attention block."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers.mlp import Mlp
from timm.layers.norm import LayerNorm
from torch import Tensor, nn


def choose_attention(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Switches every attention layer inside `module` to the kernel that trains fastest for `dtype` on `device`.

    On the CPU the backward of torch's fused attention is slower in bfloat16 than the plain product; in float32 they
    tie.
    """
    fused = not (device.type == "cpu" and dtype == torch.bfloat16)
    for layer in module.modules():
        if hasattr(layer, "fused_attn"):
            layer.fused_attn = fused  # pyright: ignore[reportArgumentType]


def block_bias(num_context: int, num_blocks: int, block_size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """-> [S, S], 0 where a query (row) sees a key, -inf elsewhere, for the sequence context | block 1 | ... | block M.

    The context sees itself; a block sees the context and itself.
    """
    last_context = num_context - 1
    owner = (torch.arange(num_context + num_blocks * block_size, device=device) - last_context + block_size - 1).clamp(
        min=0
    )
    owner = owner // block_size  # 0 for the context, m for block m
    sees = (owner == 0) | (owner[:, None] == owner)
    return torch.zeros(sees.shape, device=device, dtype=dtype).masked_fill(~sees, float("-inf"))


@lru_cache(maxsize=32)
def cached_block_bias(*arguments) -> Tensor:
    """`block_bias`, remembered, and fit for training also when the first call came from an evaluation."""
    with torch.inference_mode(False):
        return block_bias(*arguments)


def compute_dtype(tokens: Tensor) -> torch.dtype:
    """The dtype in which attention runs on `tokens`: autocast's, where it is on."""
    device = tokens.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tokens.dtype


class CrossAttention(nn.Module):
    """Queries [B, Q, D] read a context [B, K, D] -> [B, Q, D]."""

    def __init__(self, *, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.fused_attn = True
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        q = rearrange(self.q(queries), "b q (h d) -> b h q d", h=self.num_heads)
        k, v = rearrange(self.kv(context), "b k (two h d) -> two b h k d", two=2, h=self.num_heads).unbind(0)
        if self.fused_attn:
            read = F.scaled_dot_product_attention(q, k, v)
        else:
            read = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        return self.proj(rearrange(read, "b h q d -> b q (h d)"))


class CrossAttentionBlock(nn.Module):
    """Queries [B, Q, D], normed context [B, K, D] -> [B, Q, D] by cross-attention and an MLP, pre-norm."""

    def __init__(self, *, width: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = LayerNorm(width)
        self.attn = CrossAttention(width=width, num_heads=num_heads)
        self.norm2 = LayerNorm(width)
        self.mlp = Mlp(width, int(width * mlp_ratio))

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        queries = queries + self.attn(self.norm1(queries), context)
        return queries + self.mlp(self.norm2(queries))
