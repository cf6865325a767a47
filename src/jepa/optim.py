"""Parameter groups of the optimizer, and the scheduled learning rate and weight decay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer


def parameter_groups(module: nn.Module, scales: Mapping[str, float] | None = None) -> list[dict]:
    """Groups of trainable parameters: matrices with weight decay; biases, norms, tokens and other 1-D ones without.

    `scales` maps parameter names to factors of the learning rate; each factor has its two groups.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {(1.0, True): [], (1.0, False): []}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = parameter.ndim > 1 and not name.endswith(("bias", "tokens"))
        groups.setdefault(((scales or {}).get(name, 1.0), decays), []).append(parameter)
    return [{"params": params, "decays": decays, "scale": scale} for (scale, decays), params in groups.items()]


def layer_scales(module: nn.Module, encoder: Any, decay: float) -> dict[str, float]:
    """Name in `module` of each parameter of `encoder` -> factor of the learning rate: `decay` ** (blocks above it).

    The embedding counts as one block below the first; the norm after the last block has factor 1.
    """
    names = {id(submodule): name for name, submodule in module.named_modules()}
    trunk, depth = names[id(encoder.blocks)], len(encoder.blocks)
    scales = {}
    for name, _ in encoder.named_parameters(prefix=names[id(encoder)]):
        power = depth + 1
        if name.startswith(f"{trunk}."):
            power = depth - int(name.removeprefix(f"{trunk}.").partition(".")[0])
        elif name.rpartition(".")[0].endswith("norm"):
            power = 0
        scales[name] = decay**power
    return scales


def set_schedule(optimizer: Optimizer, *, lr: float, weight_decay: float) -> None:
    """Set both values in the groups that `parameter_groups` has made."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]
        group["weight_decay"] = weight_decay if group["decays"] else 0.0
