"""Actions as input of a model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers.mlp import Mlp
from torch import Tensor, nn

from jepa.types import ActionSpace, Field


class ActionEncoder(nn.Module):
    """Actions, scaled to [-1, 1] by their bounds or as one-hot codes -> [.., width]; a block has one code."""

    low: Tensor
    high: Tensor

    def __init__(self, *, field: Field, width: int) -> None:
        super().__init__()
        space = field.space or ActionSpace(low=(-1.0,) * field.shape[-1], high=(1.0,) * field.shape[-1])
        self.space = space
        self.block = field.shape[1] if len(field.shape) > 1 + len(space.shape) else 1
        self.register_buffer("low", torch.tensor(space.low))
        self.register_buffer("high", torch.tensor(space.high))
        self.mlp = Mlp(self.block * space.size, width, width, act_layer=nn.SiLU)

    def scale(self, actions: Tensor) -> Tensor:
        """[.., A] or [..] -> float32 [.., size]"""
        if self.space.is_discrete:
            return F.one_hot(actions.long(), self.space.num_actions).float()
        return 2 * (actions.float() - self.low) / (self.high - self.low) - 1

    def forward(self, actions: Tensor) -> Tensor:
        """[B, T, (block,) A] or [B, T, (block)] -> [B, T, width]"""
        return self.mlp(self.scale(actions).flatten(2))
