"""Sums, means and broadcasts of tensors over the ranks, with gradients."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes that train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of the tensors of all ranks, on every rank; the tensor itself for one process.

    The gradient is summed over the ranks too: after DDP has averaged the gradients of the ranks, a loss of this sum has
    the gradient that it has in one process.
    """
    return values if world_size() == 1 else _SumOverRanks.apply(values)  # pyright: ignore[reportReturnType]


def mean_over_ranks(values: Tensor) -> Tensor:
    """The mean of the tensors of all ranks, on every rank, with gradients as in `sum_over_ranks`."""
    return sum_over_ranks(values) / world_size()


def same_on_all_ranks(values: Tensor) -> Tensor:
    """The tensor of rank 0, on every rank and detached; the tensor itself for one process."""
    if world_size() == 1:
        return values
    shared = values.detach().contiguous().clone()
    dist.broadcast(shared, src=0)
    return shared


def gather_over_ranks(values: Tensor) -> Tensor:
    """[n, d] of each rank -> [ranks * n, d] in the order of the ranks, on every rank"""
    if world_size() == 1:
        return values
    parts = torch.zeros(world_size(), *values.shape, device=values.device)
    parts[dist.get_rank()] = values
    return sum_over_ranks(parts).flatten(0, 1)


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor) -> Tensor:
        total = values.contiguous().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor) -> Tensor:
        return _SumOverRanks.forward(ctx, *grad_outputs)
