"""Tensors that follow from sizes alone are made once."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor


def remembered(make: Callable[..., Tensor], *arguments) -> Tensor:
    """`make(*arguments)`, kept for the next call; fit for training also when the first call came from an evaluation."""
    return make(*arguments) if torch.compiler.is_compiling() else _remembered(make, *arguments)


@lru_cache(maxsize=64)
def _remembered(make: Callable[..., Tensor], *arguments) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return make(*arguments)
