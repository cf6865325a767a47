"""A causal transformer over sequences, run whole or a few positions at a time from a cache of keys and values."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers.mlp import Mlp
from timm.layers.norm import LayerNorm
from torch import Tensor, nn

from jepa.layers.init import init_weights
from jepa.layers.transformer import check_sizes

Cache = list[tuple[Tensor, Tensor]]
"""Keys and values [B, h, S, d] of each block, of the positions so far."""


class CausalTransformer(nn.Module):
    """[B, S, width] -> [B, S, width]: each position attends to itself and those before it."""

    def __init__(self, *, width: int, depth: int, num_heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        check_sizes(width, num_heads, mlp_ratio, width_key="dynamics_width", heads_key="dynamics_num_heads")
        self.blocks = nn.ModuleList(CausalBlock(width, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = LayerNorm(width)
        init_weights(self, self.blocks)

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        """Positions after those of the cache, if there is one; returns the cache of all."""
        caches = []
        for number, block in enumerate(self.blocks):
            tokens, kept = block(tokens, None if cache is None else cache[number])
            caches.append(kept)
        return self.norm(tokens), caches


class CausalBlock(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = LayerNorm(width)
        self.attn = CausalAttention(width, num_heads)
        self.norm2 = LayerNorm(width)
        self.mlp = Mlp(width, round(mlp_ratio * width))

    def forward(self, tokens: Tensor, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        attended, kept = self.attn(self.norm1(tokens), past)
        tokens = tokens + attended
        return tokens + self.mlp(self.norm2(tokens)), kept


class CausalAttention(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """[B, S, D], keys and values of the positions before -> [B, S, D], keys and values of all"""
        q, k, v = rearrange(self.qkv(tokens), "b s (three h d) -> three b h s d", three=3, h=self.num_heads)
        if past is None:
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            k, v = (torch.cat(parts, dim=2) for parts in zip(past, (k, v), strict=True))
            before = k.shape[2] - q.shape[2]
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(before)
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(rearrange(attended, "b h s d -> b s (h d)")), (k, v)
