"""Sums, means and broadcasts of tensors over the ranks, with gradients."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Processes that train together; 1 until a process group is there."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of the tensors of all ranks, on each of them; itself for one process.

    Its gradient is summed over the ranks too: a loss that every rank takes of the sum has, once the gradients of the
    ranks are averaged as DDP does, the gradient of the same loss on one rank.
    """
    return values if world_size() == 1 else _SumOverRanks.apply(values)  # pyright: ignore[reportReturnType]


def mean_over_ranks(values: Tensor) -> Tensor:
    """As `sum_over_ranks`: of means over samples, where each rank has as many, the mean over all samples."""
    return sum_over_ranks(values) / world_size()


def same_on_all_ranks(values: Tensor) -> Tensor:
    """The tensor of rank 0, which takes no gradient; itself for one process."""
    if world_size() == 1:
        return values
    shared = values.detach().contiguous().clone()
    dist.broadcast(shared, src=0)
    return shared


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor) -> Tensor:
        total = values.contiguous().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor) -> Tensor:
        return _SumOverRanks.forward(ctx, *grad_outputs)
