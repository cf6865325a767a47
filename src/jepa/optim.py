"""Which parameters decay, and setting the two scheduled values."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.optim import Optimizer


def parameter_groups(module: nn.Module) -> list[dict]:
    """Two groups: matrices, which decay; biases, norms, learned tokens and other 1-D parameters, which never do."""
    matrices, vectors = [], []
    for name, parameter in _trainable(module):
        (vectors if parameter.ndim <= 1 or name.endswith(("bias", "tokens")) else matrices).append(parameter)
    return [{"params": matrices, "decays": True}, {"params": vectors, "decays": False}]


def _trainable(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad)


def set_schedule(optimizer: Optimizer, *, lr: float, weight_decay: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = weight_decay if group["decays"] else 0.0
