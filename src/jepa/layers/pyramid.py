"""Simple feature pyramid on a plain Vision Transformer (ViTDet, Li et al. 2022, section 3)."""

from __future__ import annotations

from collections import OrderedDict

from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn

STRIDES = (0.25, 0.5, 1.0, 2.0)
"""Strides of the levels in patches: 4, 8, 16 and 32 pixels with patches of 16."""


class SimpleFeaturePyramid(nn.Module):
    """The last layer's tokens [B, D, h, w] -> four maps [B, width, ...] of h, w times 4, 2, 1 and 1/2.

    Transposed convolutions enlarge them, max pooling halves them; each level ends with 1x1 and 3x3 convolutions.
    """

    def __init__(self, *, input_dim: int, width: int) -> None:
        super().__init__()
        half, quarter = max(1, input_dim // 2), max(1, input_dim // 4)
        twice = nn.Sequential(
            nn.ConvTranspose2d(input_dim, half, 2, 2), LayerNorm2d(half), nn.GELU(),
            nn.ConvTranspose2d(half, quarter, 2, 2),
        )  # fmt: skip
        scalings = (twice, nn.ConvTranspose2d(input_dim, half, 2, 2), nn.Identity(), nn.MaxPool2d(2))
        dims = (quarter, half, input_dim, input_dim)
        self.levels = nn.ModuleList(
            nn.Sequential(
                scaling,
                nn.Conv2d(dim, width, 1, bias=False),
                LayerNorm2d(width),
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                LayerNorm2d(width),
            )
            for scaling, dim in zip(scalings, dims, strict=True)
        )

    def forward(self, features: Tensor) -> OrderedDict[str, Tensor]:
        """The levels by number, from fine to coarse."""
        return OrderedDict((str(number), level(features)) for number, level in enumerate(self.levels))
