"""What a device has: memory, and whether it computes bfloat16 fast."""

from __future__ import annotations

import os
import re
import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch


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


def total_memory(device: torch.device) -> int:
    """Bytes of the device, on a CPU of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_memory() -> int:
    """Bytes that a process can still have on this machine; where it does not tell, all of them."""
    with suppress(OSError):
        told = re.search(r"^MemAvailable: +(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
        if told:
            return int(told[1]) * 1024
    return total_memory(torch.device("cpu"))
