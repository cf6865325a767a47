"""Initial weights of all our transformers."""

from __future__ import annotations

from collections.abc import Iterable
from math import sqrt

import torch
from torch import nn

GAIN = 0.6
"""Standard deviation of a linear layer's weights, times the square root of its number of inputs."""
STD = 0.02
"""Standard deviation of learned tokens."""


@torch.no_grad()
def init_weights(module: nn.Module, blocks: Iterable[nn.Module]) -> None:
    """Linear layers ~ N(0, GAIN^2 / inputs); the output layers of block l = 1, 2, ... are divided by sqrt(2 l) (BEiT).

    At 768 inputs that is the usual 0.02, with which the tokens of a narrow model differ by little but their positions.
    Call it once, when the model is complete.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=GAIN / sqrt(layer.in_features))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    for number, block in enumerate(blocks, start=1):
        for name in ("attn.proj", "mlp.fc2"):
            block.get_parameter(f"{name}.weight").div_(sqrt(2 * number))
