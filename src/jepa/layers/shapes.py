"""Tensors that have sizes and no numbers: a model of any size is built in no memory."""

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
    """Inside, tensors have sizes and no numbers: a model of any size is built and run in no memory."""

    def __deepcopy__(self, memo: dict) -> ShapesOnly:
        return self  # a copied tensor stays of this mode


@contextmanager
def fake_init(sizes: ShapesOnly) -> Iterator[None]:
    """For constructors: where weights are drawn until none is out of bounds, none is."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Accessing the data pointer")  # copying a module looks at it
        with sizes, _Zeros():
            yield


class _Zeros(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return 0 if func is NUMBER else func(*args, **(kwargs or {}))
