"""Initial weights of every transformer here."""

from __future__ import annotations

from collections.abc import Iterable
from math import sqrt

import torch
from torch import nn

GAIN = 0.6
STD = 0.02
"""of learned tokens"""


@torch.no_grad()
def init_weights(module: nn.Module, blocks: Iterable[nn.Module]) -> None:
    """Linear layers ~ N(0, GAIN^2 / inputs), then what block l = 1, 2, ... adds to the stream divided by sqrt(2 l).

    At 768 inputs that is the usual 0.02; in a narrow model 0.02 leaves tokens that tell little but their position, and
    the predictor has nothing else to learn. Call it once, when all is built: another initialisation after it would
    undo the division (BEiT, section 2.5).
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=GAIN / sqrt(layer.in_features))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    for number, block in enumerate(blocks, start=1):
        for name in ("attn.proj", "mlp.fc2"):
            block.get_parameter(f"{name}.weight").div_(sqrt(2 * number))
