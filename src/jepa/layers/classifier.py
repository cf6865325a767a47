"""An encoder with a classification head, for fine-tuning."""

from __future__ import annotations

import torch
from timm.layers.norm import LayerNorm
from torch import Tensor, nn

from jepa.layers.attention import CrossAttentionBlock, num_heads


class Classifier(nn.Module):
    """[b, C, T, H, W] -> [b, classes]: LayerNorm of the pooled tokens, then a linear layer, initially zero.

    Tokens are pooled by their mean or, `attentive`, by cross-attention of a learned query and an MLP (V-JEPA, Bardes et
    al. 2024, section 4).
    """

    def __init__(self, *, encoder: nn.Module, width: int, num_classes: int, attentive: bool = False) -> None:
        super().__init__()
        self.encoder = encoder
        self.reader = None
        if attentive:
            self.query_tokens = nn.Parameter(0.02 * torch.randn(1, 1, width))
            self.reader = CrossAttentionBlock(width=width, num_heads=num_heads(width), mlp_ratio=4.0)
        self.norm = LayerNorm(width)
        self.classify = nn.Linear(width, num_classes)
        nn.init.zeros_(self.classify.weight)
        nn.init.zeros_(self.classify.bias)

    def forward(self, clips: Tensor) -> Tensor:
        return self.read(self.encoder(clips))

    def read(self, tokens: Tensor) -> Tensor:
        """[b, N, D] -> [b, classes]"""
        return self.classify(self.norm(self._pool(tokens)))

    def _pool(self, tokens: Tensor) -> Tensor:
        if self.reader is None:
            return tokens.mean(dim=1)
        return self.reader(self.query_tokens.expand(len(tokens), -1, -1), tokens)[:, 0]
