"""Attention: choice of the kernel, masks, rotary self-attention, and the cross-attention block."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers.attention import Attention
from timm.layers.mlp import Mlp
from timm.layers.norm import LayerNorm
from torch import Tensor, nn

HEAD_WIDTH = 64
"""Least width of a head if num_heads is not given."""


def choose_attention(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Switches every attention layer in `module` to the kernel that trains fastest for `dtype` on `device`.

    On the CPU the backward of torch's fused attention is slower than the plain product in bfloat16, equal in float32.
    """
    fused = not (device.type == "cpu" and dtype == torch.bfloat16)
    for layer in module.modules():
        if hasattr(layer, "fused_attn"):
            layer.fused_attn = fused  # pyright: ignore[reportArgumentType]


def block_bias(num_context: int, num_blocks: int, block_size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """-> [S, S] for the sequence context | block 1 | ... | block M: 0 if a query (row) attends to a key, else -inf.

    The context attends to itself, a block to the context and itself.
    """
    blocks = torch.arange(1, num_blocks + 1, device=device).repeat_interleave(block_size)
    groups = F.pad(blocks, (num_context, 0))  # 0 for the context, m for block m
    return _bias((groups == 0) | (groups[:, None] == groups), dtype)


def same_group(groups: Tensor, dtype: torch.dtype) -> Tensor:
    """Group numbers [B, S] -> [B, 1, S, S]: 0 if query and key are in one group, else -inf."""
    return _bias(groups[:, None, :, None] == groups[:, None, None, :], dtype)


def _bias(attends: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(attends.shape, device=attends.device, dtype=dtype).masked_fill(~attends, float("-inf"))


def compute_dtype(tokens: Tensor) -> torch.dtype:
    """The dtype of attention on `tokens`: that of autocast if it is enabled."""
    device = tokens.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tokens.dtype


def attend(q: Tensor, k: Tensor, v: Tensor, *, fused: bool, mask: Tensor | None = None) -> Tensor:
    """[B, h, Q, d], 2 x [B, h, K, d] -> [B, Q, h*d]; `mask`, 0 or -inf, is added to the logits."""
    if fused:
        outputs = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    else:
        logits = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)
        outputs = (logits if mask is None else logits + mask).softmax(dim=-1) @ v
    return rearrange(outputs, "b h q d -> b q (h d)")


class SelfAttention(Attention):
    """timm's self-attention with optional rotary positions and prefix: [B, S, D] -> [B, S, D]."""

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, rope: Tensor | None = None,
        prefix: int = 0,
    ) -> Tensor:  # fmt: skip
        """`rope` comes from Positions.rope; the first `prefix` tokens attend only to themselves, the others to all."""
        if rope is None and not prefix:
            return super().forward(x, attn_mask, is_causal)
        qk, v = self.qkv(x).unflatten(2, (3, self.num_heads, self.head_dim)).split((2, 1), dim=2)
        qk = qk if rope is None else apply_rope(qk, rope)  # [B, S, 2, h, d]
        q, k, v = (t.transpose(1, 2) for t in (*qk.unbind(2), v.squeeze(2)))  # 3 of [B, h, S, d]
        outputs = attend(q[:, :, prefix:], k, v, fused=self.fused_attn, mask=attn_mask)
        if prefix:
            prefix_outputs = attend(*(t[:, :, :prefix] for t in (q, k, v)), fused=self.fused_attn)
            outputs = torch.cat([prefix_outputs, outputs], dim=1)
        return self.proj(outputs)


def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """[B, S, 2, h, d] -> the same shape, each pair of the last axis rotated by its angle."""
    cosines, sines = rope.unbind(0)
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(x * cosines, swapped, sines)


def num_heads(width: int) -> int:
    """The largest number of heads of equal width, at least HEAD_WIDTH; 1 for a smaller `width`."""
    return next(heads for heads in range(max(1, width // HEAD_WIDTH), 0, -1) if width % heads == 0)


class CrossAttention(nn.Module):
    """Queries [B, Q, D], context [B, K, D] -> [B, Q, D]."""

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
        return self.proj(attend(q, k, v, fused=self.fused_attn))


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
