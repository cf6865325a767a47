"""How parameters lie on the ranks: whole on each (DDP, Li et al. 2020) or in shards (FSDP2, after Zhao et al. 2023)."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from jepa.parallel.session import Session


def prepare(objective: nn.Module, session: Session, *, compiled: bool) -> nn.Module:
    """The module that a step calls; with `fsdp` the parameters of `objective` are shards from here on."""
    module = objective
    if session.strategy == "fsdp":
        _shard(objective, session)
    elif session.strategy == "ddp":
        from torch.nn.parallel import DistributedDataParallel

        known = inspect.signature(DistributedDataParallel).parameters  # of which newer ones have the first
        off = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        idles = getattr(objective, "may_leave_parameters_idle", False)
        options: dict[str, bool] = {off: False, "find_unused_parameters": idles, "gradient_as_bucket_view": True}
        module = DistributedDataParallel(objective, **options)  # pyright: ignore[reportArgumentType]
    return torch.compile(module) if compiled else module  # pyright: ignore[reportReturnType]


def _shard(objective: nn.Module, session: Session) -> None:
    """Every block of a trunk by itself, so that one at a time is whole, and the rest together."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(session.device.type, (session.world_size,))
    dtype = torch.bfloat16 if session.bf16 else None
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in blocks_of(objective):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(objective, mesh=mesh, mp_policy=policy)


def blocks_of(objective: nn.Module) -> list[nn.Module]:
    """The blocks of all trunks: what is whole one at a time."""
    return [block for trunk in objective.modules() if isinstance(trunk, nn.ModuleList) for block in trunk]


def accumulating(module: nn.Module) -> AbstractContextManager:
    """Gradients inside stay on their rank until a later backward; shards are reduced each time, for want of memory."""
    no_sync = getattr(module, "no_sync", None)
    return no_sync() if no_sync else nullcontext()


def local_parts(tensors: Iterable[Tensor]) -> list[Tensor]:
    """What of each tensor lies on this rank, to be changed in place."""
    return [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]  # pyright: ignore


def whole(tensor: Any) -> Tensor:
    """The same tensor, no longer spread over the ranks."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def collect(objective: nn.Module, into: nn.Module | None) -> None:
    """Put the weights of an objective in shards together, in `into` on rank 0; all ranks take part."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    weights = get_model_state_dict(objective, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if into is not None:
        into.load_state_dict(weights)
