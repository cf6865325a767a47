"""What a forward and backward pass computes and keeps, counted on tensors that have sizes and no numbers."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from jepa.parallel.strategy import blocks_of
from jepa.types import Batch, Masks

log = logging.getLogger("torch._subclasses.fake_tensor")
CAST = torch.ops.aten._to_copy.default


@dataclass(frozen=True, kw_only=True)
class Pass:
    """FLOPs, and bytes of tensors besides the parameters, their gradients and the batch."""

    forward: int
    backward: int
    activations: int
    """alive after the forward pass, without `casts`"""
    casts: int
    """copies of parameters in another dtype, alive after the forward pass"""
    peak: int
    """at the worst moment of both passes, `activations` and `casts` included"""


def _silent(record: logging.LogRecord) -> bool:
    return False


def measure(objective: nn.Module, batch: Batch, masks: Masks, *, bf16: bool, backward: bool = True) -> Pass:
    """One training pass over the batch, of tensors with numbers or of sizes alone; gradients are gone afterwards.

    Without `backward` only the forward pass is seen, in a third of the time.
    """
    given = [*objective.parameters(), *objective.buffers(), batch.clips, *batch.fields.values()]
    given += [t for part in masks.sets for t in part] + ([] if batch.local is None else [batch.local])
    meter = _Meter(given, [p for p in objective.parameters() if p.requires_grad])
    log.addFilter(_silent)  # what fails is raised too
    try:
        with meter, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = objective(batch, masks).loss
        forward, casts = meter.flops, meter.cast
        activations = meter.live - casts
        with meter if backward else nullcontext():
            loss = loss.backward() if backward else None
    finally:
        log.removeFilter(_silent)
        meter.close()
        objective.zero_grad(set_to_none=True)
    return Pass(
        forward=forward,
        backward=meter.flops - forward,
        activations=activations,
        casts=casts,
        peak=meter.peak,
    )


class _Meter(TorchDispatchMode):
    """Counts FLOPs of matrix products and the bytes of storages that are alive."""

    def __init__(self, given: list[Tensor], trained: list[nn.Parameter]) -> None:
        super().__init__()
        self.given = {_key(tensor) for tensor in given}
        self.parameters = {_key(parameter) for parameter in trained}
        self.sizes: dict[int, int] = {}
        self.casts: set[int] = set()
        self.live = self.peak = self.cast = self.flops = 0
        self.hooks = [p.register_post_accumulate_grad_hook(self._set_aside) for p in trained]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count: Callable | None = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        is_cast = func is CAST and _key(args[0]) in self.parameters
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self._add(tensor, is_cast)
        self.peak = max(self.peak, self.live)
        return out

    def _add(self, tensor: Tensor, is_cast: bool) -> None:
        key, storage = _key(tensor), tensor.untyped_storage()
        if key in self.given or key in self.sizes:
            return
        self.sizes[key] = storage.nbytes()
        self.live += storage.nbytes()
        if is_cast:
            self.casts.add(key)
            self.cast += storage.nbytes()
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        size = self.sizes.pop(key, 0)
        self.live -= size
        if key in self.casts:
            self.casts.remove(key)
            self.cast -= size

    def _set_aside(self, parameter: Tensor) -> None:
        """Gradients are counted by whoever knows how they are kept."""
        if parameter.grad is not None:
            self._free(_key(parameter.grad))

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def state_bytes(make: Callable[..., Optimizer]) -> float:
    """What the optimizer keeps of a trained parameter, seen on a small one."""
    parameter = nn.Parameter(torch.zeros(32, 32))
    parameter.grad = torch.zeros_like(parameter)
    optimizer = make([{"params": [parameter]}], lr=1e-3)
    optimizer.step()
    kept = [t for t in tree_iter(dict(optimizer.state)) if isinstance(t, Tensor) and t.numel() > 1]
    return sum(t.numel() * t.element_size() for t in kept) / parameter.numel()


def block_sizes(objective: nn.Module) -> tuple[int, int]:
    """Parameters of the largest block of a trunk, and those outside of all blocks."""
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks_of(objective)]
    return max(sizes, default=0), sum(p.numel() for p in objective.parameters()) - sum(sizes)
