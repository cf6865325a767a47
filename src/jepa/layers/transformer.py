"""The trunk that encoder and predictor share: timm's pre-norm blocks."""

from __future__ import annotations

from timm.layers.norm import LayerNorm
from timm.models.vision_transformer import Block
from torch import nn


def make_blocks(*, width: int, depth: int, num_heads: int, mlp_ratio: float, drop_path: float = 0.0) -> nn.ModuleList:
    """`depth` blocks [B, N, width] -> [B, N, width]; the rate of drop path grows linearly from 0 to `drop_path`."""
    rates = [drop_path * number / max(depth - 1, 1) for number in range(depth)]
    return nn.ModuleList(
        Block(width, num_heads, mlp_ratio=mlp_ratio, qkv_bias=True, norm_layer=LayerNorm, drop_path=rate)
        for rate in rates
    )


def check_sizes(*, width: int, depth: int, num_heads: int, mlp_ratio: float, width_key: str, heads_key: str) -> None:
    """Refuses what no trunk can be; `width_key` and `heads_key` are the keys that the user would change."""
    if depth < 1:
        raise ValueError(f"depth={depth}: a trunk needs at least one block")
    if num_heads < 1 or width % num_heads:
        raise ValueError(f"{width_key}={width} is not divisible by {heads_key}={num_heads}: change one of them")
    if int(width * mlp_ratio) < 1:
        raise ValueError(f"mlp_ratio={mlp_ratio} leaves no hidden unit at {width_key}={width}")
