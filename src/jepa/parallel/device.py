"""Name and memory of a device, and whether it computes fast in bfloat16."""

from __future__ import annotations

import os
import re
import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor


def device_name(device: torch.device) -> str:
    """The name of the GPU, or `CPU`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()


def has_fast_bf16(device: torch.device) -> bool:
    """False for a CPU without AVX512-BF16, which emulates bfloat16 several hundred times slower, and an Apple GPU."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def double(tensor: Tensor) -> Tensor:
    """In float64; from an Apple GPU, which has none, on the CPU."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory so far: of tensors on a GPU, of the whole process on a CPU. Does not synchronize."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def total_memory(device: torch.device) -> int:
    """Bytes of the GPU, or of the machine for a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_memory() -> int:
    """Bytes of free memory of this machine; all of its memory if /proc/meminfo does not have the number."""
    with suppress(OSError):
        if available := re.search(r"^MemAvailable: +(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE):
            return int(available[1]) * 1024
    return total_memory(torch.device("cpu"))
