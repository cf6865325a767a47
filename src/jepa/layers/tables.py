"""Tensors that follow from sizes alone are made once."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


def remembered(make: Callable[..., Tensor], *arguments) -> Tensor:
    """`make(*arguments)`, kept for the next call; fit for training also when the first call came from an evaluation."""
    passes = torch.compiler.is_compiling() or is_in_torch_dispatch_mode()  # where tensors may lack numbers
    return make(*arguments) if passes else _remembered(make, *arguments)


@lru_cache(maxsize=64)
def _remembered(make: Callable[..., Tensor], *arguments) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return make(*arguments)
