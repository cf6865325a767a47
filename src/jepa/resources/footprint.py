"""FLOPs and memory of a forward and a backward pass, counted on fake tensors."""

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
    """FLOPs, and bytes of tensors other than the parameters, their gradients and the batch."""

    forward: int
    backward: int
    activations: int
    """Bytes after the forward pass, without `casts`."""
    casts: int
    """Bytes of parameters copied to another dtype, after the forward pass."""
    peak: int
    """Largest number of bytes in both passes, with `activations` and `casts`."""


def measure(objective: nn.Module, batch: Batch, masks: Masks, *, bf16: bool, backward: bool = True) -> Pass:
    """One training pass over the batch, of real or fake tensors; gradients are deleted afterwards.

    Without `backward` only the forward pass is measured, in a third of the time.
    """
    inputs = [*objective.parameters(), *objective.buffers(), batch.clips, *batch.fields.values()]
    inputs += [t for mask_set in masks.sets for t in mask_set] + ([] if batch.local is None else [batch.local])
    meter = _Meter(inputs, [p for p in objective.parameters() if p.requires_grad])
    was_disabled, log.disabled = log.disabled, True  # errors are raised too
    try:
        with meter, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = objective(batch, masks).loss
        forward, casts = meter.flops, sum(meter.casts.values())
        activations = meter.live - casts
        with meter if backward else nullcontext():
            loss = loss.backward() if backward else None
    finally:
        log.disabled = was_disabled
        for hook in meter.hooks:
            hook.remove()
        objective.zero_grad(set_to_none=True)
    backward_flops = meter.flops - forward
    return Pass(forward=forward, backward=backward_flops, activations=activations, casts=casts, peak=meter.peak)


class _Meter(TorchDispatchMode):
    """Counts the FLOPs of matrix products and the bytes of storages that are alive."""

    def __init__(self, inputs: list[Tensor], trained: list[nn.Parameter]) -> None:
        super().__init__()
        self.inputs = {_key(tensor) for tensor in inputs}
        self.parameters = {_key(parameter) for parameter in trained}
        self.sizes: dict[int, int] = {}
        self.casts: dict[int, int] = {}
        self.live = self.peak = self.flops = 0
        # Gradients are not counted here: how many bytes they take depends on the strategy.
        self.hooks = [p.register_post_accumulate_grad_hook(lambda p: self._free(_key(p.grad))) for p in trained]

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
        if key in self.inputs or key in self.sizes:
            return
        self.sizes[key] = storage.nbytes()
        self.live += storage.nbytes()
        if is_cast:
            self.casts[key] = storage.nbytes()
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.live -= self.sizes.pop(key, 0)
        self.casts.pop(key, None)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def state_bytes(make: Callable[..., Optimizer]) -> float:
    """Bytes of optimizer state per trained parameter, measured on a small tensor."""
    parameter = nn.Parameter(torch.zeros(32, 32))
    parameter.grad = torch.zeros_like(parameter)
    optimizer = make([{"params": [parameter]}], lr=1e-3)
    optimizer.step()
    state = [t for t in tree_iter(dict(optimizer.state)) if isinstance(t, Tensor) and t.numel() > 1]
    return sum(tensor.nbytes for tensor in state) / parameter.numel()


def block_sizes(objective: nn.Module) -> tuple[int, int]:
    """Number of parameters of the largest block, and outside of all blocks."""
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks_of(objective)]
    return max(sizes, default=0), sum(p.numel() for p in objective.parameters()) - sum(sizes)
