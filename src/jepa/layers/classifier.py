"""An encoder with a linear head: what fine-tuning trains."""

from __future__ import annotations

from timm.layers.norm import LayerNorm
from torch import Tensor, nn


class Classifier(nn.Module):
    """[b, C, T, H, W] -> [b, classes]: LayerNorm of the mean token, then a linear layer that begins at zero."""

    def __init__(self, *, encoder: nn.Module, width: int, num_classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.norm = LayerNorm(width)
        self.classify = nn.Linear(width, num_classes)
        nn.init.zeros_(self.classify.weight)
        nn.init.zeros_(self.classify.bias)

    def forward(self, clips: Tensor) -> Tensor:
        return self.read(self.encoder(clips))

    def read(self, tokens: Tensor) -> Tensor:
        """[b, N, D] -> [b, classes]"""
        return self.classify(self.norm(tokens.mean(dim=1)))
