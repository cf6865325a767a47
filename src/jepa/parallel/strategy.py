"""Parameters on the ranks: replicated (DDP, Li et al. 2020) or sharded (FSDP2, after Zhao et al. 2023)."""

from __future__ import annotations

import inspect
import os
import shutil
import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from jepa.errors import ConfigError
from jepa.parallel.session import Session


def wrap(objective: Any, session: Session, *, compiled: bool) -> nn.Module:
    """The module that a training step calls; with strategy=fsdp the parameters of `objective` become shards."""
    module = objective
    if session.strategy == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = init_device_mesh(session.device.type, (session.world_size,))
        dtype = torch.bfloat16 if session.bf16 else None
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for part in (*blocks_of(objective), objective):  # each block by itself, then all other parameters together
            fully_shard(part, mesh=mesh, mp_policy=policy)
    elif session.strategy == "ddp":
        from torch.nn.parallel import DistributedDataParallel

        parameters = inspect.signature(DistributedDataParallel).parameters
        sync = "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers"  # its older name
        unused = objective.may_leave_parameters_idle
        options: dict[str, bool] = {sync: False, "find_unused_parameters": unused, "gradient_as_bucket_view": True}
        module = DistributedDataParallel(objective, **options)  # pyright: ignore[reportArgumentType]
    if compiled:
        check_compiler(session.device)
    return torch.compile(module) if compiled else module  # pyright: ignore[reportReturnType]


def check_compiler(device: torch.device) -> None:
    """Raises ConfigError if the compiler that torch.compile starts in the first step is missing."""
    cpp = "clang++" if sys.platform == "darwin" else "g++"
    variable, names = ("CC", ["gcc", "clang"]) if device.type == "cuda" else ("CXX", [cpp])
    given = os.environ.get(variable, "").split()[:1]
    if not any(map(shutil.which, given or names)):
        reason = f"{variable}={given[0]} is no program" if given else f"there is no {' or '.join(names)}"
        raise ConfigError([f"compile=true: {reason}; install a compiler, name it in {variable}, or use compile=false"])


def blocks_of(objective: nn.Module) -> list[nn.Module]:
    """The transformer blocks, that is the modules of every ModuleList; FSDP gathers one at a time."""
    return [block for blocks in objective.modules() if isinstance(blocks, nn.ModuleList) for block in blocks]


def no_grad_sync(module: nn.Module) -> AbstractContextManager:
    """Inside, DDP does not average gradients; FSDP still reduces its shards in every backward pass, to save memory."""
    return module.no_sync() if hasattr(module, "no_sync") else nullcontext()  # pyright: ignore


def local_shards(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This rank's shards of the tensors, for in-place updates."""
    return [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]  # pyright: ignore


def full_tensor(tensor: Any) -> Tensor:
    """The unsharded tensor."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gather_full_state(objective: nn.Module, into: nn.Module | None) -> None:
    """Gather the weights of a sharded objective into `into` on rank 0; all ranks call it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    weights = get_model_state_dict(objective, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if into is not None:
        into.load_state_dict(weights)
