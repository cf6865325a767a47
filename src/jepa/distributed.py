"""Where a run computes: device, precision, rank and the random generators that all of it derives from."""

from __future__ import annotations

import hashlib
import resource
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Session:
    """The device and the arithmetic of this process; one process for now."""

    device: torch.device
    bf16: bool
    rank: int = 0
    world_size: int = 1

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()


def open_session(*, device: str, precision: str) -> Session:
    """Raises ValueError where the device is not there."""
    chosen = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={device}: torch {torch.__version__} finds no CUDA device; use device=cpu")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={device}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    if chosen.type == "cuda":
        torch.set_float32_matmul_precision("high")
    return Session(device=chosen, bf16=has_fast_bf16(chosen) if precision == "auto" else precision == "bf16")


def has_fast_bf16(device: torch.device) -> bool:
    """A CPU without AVX512-BF16 emulates bfloat16, several hundred times slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported()


def peak_memory_gib(device: torch.device) -> float:
    """The most memory that was in use at once: tensors on a GPU, on a CPU the whole process; waits for nothing."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def derive_seed(seed: int, step: int, rank: int, stream: str) -> int:
    """A 63-bit seed, a pure function of its arguments; streams ("masks", "augment") are independent."""
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}/{stream}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, step: int, rank: int, stream: str) -> torch.Generator:
    """A CPU generator, seeded by `derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(seed, step, rank, stream))


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
