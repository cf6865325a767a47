"""Gradient caching (Gao et al. 2021): regularisers see the whole batch although it is computed in micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from jepa.types import Latents, Masks, Regularizer


class GradCache:
    """Replaces the regularisers in the objective's forward, in two passes over the micro-batches.

    The first pass, without gradients, stores the latents; `compute` takes the penalty of the whole batch and its
    gradient with respect to the latents; the second pass backpropagates each micro-batch's part of that gradient. Only
    the latents of the whole batch are in memory, and the activations of one micro-batch (section 3.1).
    """

    def __init__(self, num_micro_batches: int) -> None:
        self.latents: list[list[Latents]] = [[] for _ in range(num_micro_batches)]
        self.penalties: list[tuple[Tensor, dict[str, Tensor], list[list[Tensor]]]] = []
        self.index = 0
        """Number of the micro-batch in the current forward pass."""

    @property
    def is_recording(self) -> bool:
        """True in the first pass, which stores the latents."""
        return not self.penalties

    @torch.compiler.disable
    def __call__(self, number: int, latents: Latents) -> tuple[Tensor, dict[str, Tensor]]:
        """The penalty of the whole batch for mask set `number`, with the gradient of this micro-batch."""
        if self.is_recording:
            self.latents[self.index].append(latents)
            return latents.context.new_zeros((), dtype=torch.float32), {}
        value, terms, grads = self.penalties[number]
        pairs = zip(_tensors(latents), grads[self.index], strict=True)
        product = torch.stack([(tensor.float() * grad).sum() for tensor, grad in pairs]).sum()
        sizes = [len(mask_sets[0].context) for mask_sets in self.latents]
        return value + (product - product.detach()) / (sizes[self.index] / sum(sizes)), terms

    def compute(self, penalty: Regularizer) -> None:
        """The penalty of the whole batch and its gradient, for each mask set."""
        penalties = []
        for micro_batches in zip(*self.latents, strict=True):
            joined = _concatenate(micro_batches)
            leaves = [tensor.requires_grad_() for tensor in _tensors(joined)]
            value, terms = penalty(joined)
            gradients = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
            sizes = zip(*([len(tensor) for tensor in _tensors(latents)] for latents in micro_batches), strict=True)
            parts = (grad.float().split(list(size)) for grad, size in zip(gradients, sizes, strict=True))
            grads = [list(part) for part in zip(*parts, strict=True)]
            penalties.append((value.detach(), terms, grads))
        self.penalties = penalties


def _tensors(latents: Latents) -> list[Tensor]:
    local = [] if latents.local is None else _tensors(latents.local)
    return [latents.context, latents.predicted, *local]


def _concatenate(parts: Sequence[Latents]) -> Latents:

    def concatenated(select: Callable[[Latents], Tensor]) -> Tensor:
        return torch.cat([select(latents) for latents in parts])

    local = [latents.local for latents in parts if latents.local is not None]
    return parts[0]._replace(
        context=concatenated(lambda p: p.context),
        predicted=concatenated(lambda p: p.predicted),
        masks=Masks(concatenated(lambda p: p.masks.context), concatenated(lambda p: p.masks.targets)),
        local=_concatenate(local) if local else None,
    )
