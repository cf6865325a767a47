"""Parameter groups of the optimizer, and the scheduled learning rate and weight decay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer


def parameter_groups(module: nn.Module, scales: Mapping[str, float] | None = None) -> list[dict]:
    """Groups of trainable parameters: matrices with weight decay; biases, norms, tokens and other 1-D ones without.

    The filters of a dictionary do not decay either, since they may be frozen at first. `scales` maps parameter names
    to factors of the learning rate; each factor has groups of its own. Matrices outside of hidden layers form groups
    with `use_fallback`, to which Muon applies AdamW.
    """
    groups: dict[tuple[float, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = parameter.ndim > 1 and not name.endswith(("bias", "tokens", "filters"))
        kind = (scales or {}).get(name, 1.0), decays, decays and is_hidden(name)
        groups.setdefault(kind, []).append(parameter)
    return [
        {"params": params, "decays": decays, "scale": scale, "use_fallback": not hidden}
        for (scale, decays, hidden), params in sorted(groups.items(), reverse=True)
    ]


def is_hidden(name: str) -> bool:
    """True for parameters of transformer blocks and of the layers of a stem behind its first."""
    return any(part in f".{name}" for part in (".blocks.", ".hidden."))


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
