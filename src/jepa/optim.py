"""Which parameters decay, and setting the two scheduled values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer


def parameter_groups(module: nn.Module, scales: Mapping[str, float] | None = None) -> list[dict]:
    """Matrices, which decay; biases, norms, learned tokens and other 1-D parameters, which never do.

    Two groups, or two for each share of the learning rate in `scales`, by parameter name.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {(1.0, True): [], (1.0, False): []}
    for name, parameter in _trainable(module):
        decays = parameter.ndim > 1 and not name.endswith(("bias", "tokens"))
        groups.setdefault(((scales or {}).get(name, 1.0), decays), []).append(parameter)
    return [{"params": found, "decays": decays, "scale": scale} for (scale, decays), found in groups.items()]


def layer_scales(module: nn.Module, encoder: Any, decay: float) -> dict[str, float]:
    """Parameter of `encoder`, by its name in `module` -> its share of the learning rate: `decay` for each block above.

    The embedding is one block below the first, the norm behind the last block has the whole rate.
    """
    names = {id(part): name for name, part in module.named_modules()}
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


def _trainable(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad)


def set_schedule(optimizer: Optimizer, *, lr: float, weight_decay: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]
        group["weight_decay"] = weight_decay if group["decays"] else 0.0
