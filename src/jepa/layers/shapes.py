"""Tensors with shapes and no values, of which a model of any size takes no memory."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

NUMBER = torch.ops.aten._local_scalar_dense.default


class ShapesOnly(FakeTensorMode):
    """Inside, tensors have shapes and no values, so that a model of any size takes no memory."""

    def __deepcopy__(self, memo: dict) -> ShapesOnly:
        return self  # a copied tensor keeps this mode


@contextmanager
def fake_init(shapes_only: ShapesOnly) -> Iterator[None]:
    """The mode for constructors: every scalar is read as 0, so that rejection sampling in initialisers terminates."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Accessing the data pointer")  # done when a module is copied
        with shapes_only, _ZeroScalars():
            yield


class _ZeroScalars(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return 0 if func is NUMBER else func(*args, **(kwargs or {}))
