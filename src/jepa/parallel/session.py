"""Where a run computes: device, precision, rank and process group.

Several processes find each other through the variables of torchrun or Slurm. A rank that cannot reach the others stops,
so that it cannot overwrite their files.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from jepa.errors import ConfigError, RunError, as_config_errors
from jepa.parallel.device import has_fast_bf16
from jepa.parallel.environment import ProcessInfo, environment_summary, process_info, rendezvous

T = TypeVar("T")
RENDEZVOUS_TIMEOUT = timedelta(minutes=10)
"""Timeout for finding the other ranks."""
COLLECTIVE_TIMEOUT = timedelta(days=1)
"""Timeout for a rank that evaluates or saves; the loss of a rank is an error at once."""
BACKENDS = {"cpu": "cpu:gloo", "cuda": "cpu:gloo,cuda:nccl"}
FAILURE = "jepa/failure"
"""Key of the process group's store under which a rank leaves the message of its error."""


class PeerError(RunError):
    """Another rank failed; `status` is the exit status of this process, `brief` the message for the terminal."""

    on_all_ranks = True

    def __init__(self, message: str, status: int = 1, brief: str = "") -> None:
        super().__init__(message)
        self.status, self.brief = status, brief or message


@dataclass(frozen=True)
class Session:
    """Device and precision of this process, and its communication with the other ranks."""

    device: torch.device
    bf16: bool
    rank: int = 0
    world_size: int = 1
    strategy: str = "single"
    group: Any = None
    """Gloo group for objects on the CPU, independent of the device's backend."""

    @property
    def is_rank_zero(self) -> bool:
        """True on the rank that writes files and prints."""
        return self.rank == 0

    @property
    def is_single(self) -> bool:
        return self.world_size == 1

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()

    def local_rows(self, tensor: Tensor, views: int = 1) -> Tensor:
        """[B * views, ...] -> [b * views, ...]: the views of this rank's samples rank, rank + world size, ..."""
        if self.is_single:
            return tensor
        return tensor.unflatten(0, (-1, views))[self.rank :: self.world_size].flatten(0, 1)

    def local_row_indices(self, batch_size: int, views: int = 1) -> Tensor | None:
        """[b * views]: indices of the `local_rows` of a batch [B * views, ...]; None for all of them."""
        return None if self.is_single else self.local_rows(torch.arange(batch_size * views), views)

    def broadcast_from_rank_zero(self, make: Callable[[], T]) -> T:
        """The value that `make` returns on rank 0, on all ranks; if it raises, the others raise PeerError."""
        if self.is_single:
            return make()
        message: list[Any] = [None, None]
        failure: Exception | None = None
        if self.is_rank_zero:
            try:
                message[0] = make()
            except (ValueError, RuntimeError, OSError) as error:
                failure = error
                message[1] = str(error), 2 if isinstance(error, ConfigError) else 1
        dist.broadcast_object_list(message, src=0, group=self.group)
        if failure is not None:
            raise failure
        if message[1] is not None:
            raise PeerError(message=message[1][0], status=message[1][1])
        return message[0]

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, on every rank."""
        if self.is_single:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values


class StopSignal:
    """The number of the signal that the ranks stop for: the largest that any of them has received.

    Between steps the exchange costs no time: it runs in the background and its result is used one step later. A rank
    that has died makes it fail, within a step.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.pending: tuple[Any, Tensor] | None = None

    def exchange_async(self, value: int) -> int:
        """Starts an exchange of `value`; returns the largest of the previous one (of this one with one process)."""
        if self.session.is_single:
            return value
        previous = self._result()
        number = torch.tensor([value])
        self.pending = dist.all_reduce(number, dist.ReduceOp.MAX, group=self.session.group, async_op=True), number
        return previous

    def exchange(self, value: int) -> int:
        """The largest number of all ranks, at once."""
        return max(self.exchange_async(value), self._result())

    def _result(self) -> int:
        if self.pending is None:
            return 0
        (work, number), self.pending = self.pending, None
        work.wait()
        return int(number)


def open_session(*, device: str, precision: str, local_rank: int | None = None) -> Session:
    """The session of one process, on the GPU of `local_rank` if given. Raises ValueError if there is no such device."""
    chosen = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    if chosen.type == "cuda":
        chosen = _cuda_device(chosen, local_rank)
        torch.set_float32_matmul_precision("high")
    elif chosen.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"device={device}: torch {torch.__version__} finds no Apple GPU; use device=cpu")
    elif chosen.type == "mps" and local_rank is not None:
        raise ValueError(f"device={device}: an Apple GPU is used by one process")
    return Session(device=chosen, bf16=has_fast_bf16(chosen) if precision == "auto" else precision == "bf16")


def _cuda_device(device: torch.device, local_rank: int | None) -> torch.device:
    if not torch.cuda.is_available():
        raise ValueError(f"device={device}: torch {torch.__version__} finds no CUDA device; use device=cpu")
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise ValueError(f"device={device}: there are {count} CUDA devices, counted from 0")
    if local_rank is None:
        return device
    if device.index is not None:
        raise ValueError(f"device={device}: several processes have a GPU each; use device=cuda")
    return torch.device("cuda", local_rank % count)  # a process sees one GPU if Slurm hides the others


@contextmanager
def open_distributed_session(
    *, device: str, precision: str, strategy: str, environ: Mapping[str, str]
) -> Iterator[Session]:
    """The session of one process or of one rank; the process group exists while the block runs.

    Raises ConfigError if there is no such device, RunError if the other ranks cannot be reached.
    """
    process = process_info(environ) or ProcessInfo()
    if strategy == "single" and process.world_size > 1:
        raise ConfigError([f"strategy=single: {process.world_size} processes were started; use strategy=ddp or fsdp"])
    if strategy == "auto":
        strategy = "ddp" if process.world_size > 1 else "single"
    with as_config_errors():
        local_rank = process.local_rank if process.world_size > 1 else None
        session = open_session(device=device, precision=precision, local_rank=local_rank)
    if process.world_size == 1 and strategy != "fsdp":
        yield session
        return
    _init_process_group(process, session.device, environ)
    group = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
    session = replace(session, rank=process.rank, world_size=process.world_size, strategy=strategy, group=group)
    try:
        with forward_failures(session):
            yield session
    finally:
        if session.is_single or sys.exc_info()[0] is None:  # with ranks lost, this may block for ever
            dist.destroy_process_group()


def _init_process_group(process: ProcessInfo, device: torch.device, environ: Mapping[str, str]) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if process.world_size == 1:
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(BACKENDS[device.type], store=store, rank=0, world_size=1)
        return
    if process.local_size == process.world_size and sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the name of this host may not resolve
    address, port = rendezvous(environ)
    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))
    try:
        dist.init_process_group(
            BACKENDS[device.type], rank=process.rank, world_size=process.world_size, timeout=RENDEZVOUS_TIMEOUT
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise RunError(
            f"the {process.world_size} processes of this run did not find each other at {address}:{port} within "
            f"{RENDEZVOUS_TIMEOUT}: {str(error).splitlines()[0]}. This is rank {process.rank} on "
            f"{socket.gethostname()}, with {environment_summary(environ)}. Set MASTER_ADDR to an address of the first "
            "node that all nodes reach, MASTER_PORT to a free port, and make sure that every rank is started"
        ) from error


@contextmanager
def forward_failures(session: Session) -> Iterator[None]:
    """An error of one rank is passed to the others, which raise PeerError with its message, not a connection error."""
    if session.group is None:
        yield
        return
    store = dist.distributed_c10d._get_default_store()
    try:
        yield
    finally:
        error = sys.exc_info()[1]
        if error is not None and is_connection_error(error):
            cause = _cause(store, error)
            rank, failed, _ = cause.partition(" failed: ")
            brief = f"stopped: {rank} failed; see its message" if failed else ""
            raise PeerError(f"stopped: {cause}", brief=brief) from error
        if error is not None and not isinstance(error, ConfigError) and not getattr(error, "on_all_ranks", False):
            reason = str(error) if isinstance(error, RunError) else f"{type(error).__name__}: {error}"
            with suppress(RuntimeError):
                store.set(FAILURE, f"rank {session.rank} on {socket.gethostname()} failed: {reason}")


def _cause(store: Any, error: BaseException) -> str:
    """The message of the rank that failed, if it left one; the store is lost with rank 0."""
    with suppress(RuntimeError):
        for _ in range(20):
            if store.check([FAILURE]):
                return store.get(FAILURE).decode()
            time.sleep(0.1)
    reason = str(error).splitlines()[0]
    return f"contact with another rank was lost, which has failed or was killed; see its message ({reason})"


def is_connection_error(error: BaseException) -> bool:
    """True if a collective failed because a rank is gone."""
    texts = "closed by peer", "reset by peer", "Broken pipe", "Timed out waiting", "NCCL communicator was aborted"
    is_runtime_error = isinstance(error, RuntimeError) and not isinstance(error, PeerError)
    return is_runtime_error and any(text in str(error) for text in texts)
