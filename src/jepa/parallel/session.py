"""Where a run computes (device, precision, which of how many ranks) and the random numbers that it derives from.

One process needs no process group. Several meet through the variables of torchrun or of Slurm; whoever finds no other
stops, since a rank that trains alone would spoil what it writes.
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
"""that the processes of a run may take to find each other"""
COLLECTIVE_TIMEOUT = timedelta(days=1)
"""that ranks wait for one that evaluates or saves; a rank that has died is noticed at once"""
BACKENDS = {"cpu": "cpu:gloo", "cuda": "cpu:gloo,cuda:nccl"}
FAILURE = "jepa/failure"


class PeerError(RunError):
    """The reason lies with another rank, which tells it; `status` is that of the process, `brief` for the terminal."""

    def __init__(self, message: str, status: int = 1, brief: str = "") -> None:
        super().__init__(message)
        self.status, self.brief = status, brief or message

    on_all_ranks = True


@dataclass(frozen=True)
class Session:
    """The device and the arithmetic of this process, and what it says to the others."""

    device: torch.device
    bf16: bool
    rank: int = 0
    world_size: int = 1
    strategy: str = "single"
    group: Any = None
    """in which the hosts talk to each other, whatever the devices do"""

    @property
    def is_rank_zero(self) -> bool:
        """Whether this rank is the one that writes and speaks."""
        return self.rank == 0

    @property
    def is_single(self) -> bool:
        return self.world_size == 1

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()

    def local_rows(self, tensor: Tensor, views: int = 1) -> Tensor:
        """Of the global batch [B * views, ...] the rows of this rank's samples: rank, rank + world size, ..."""
        if self.is_single:
            return tensor
        return tensor.unflatten(0, (-1, views))[self.rank :: self.world_size].flatten(0, 1)

    def local_row_indices(self, batch_size: int, views: int = 1) -> Tensor | None:
        """[b * views]: the numbers of the rows that `local_rows` takes of a batch [B * views, ...]; None: all of them."""
        return None if self.is_single else self.local_rows(torch.arange(batch_size * views), views)

    def broadcast_from_rank_zero(self, make: Callable[[], T]) -> T:
        """What rank 0 makes of it, on all ranks; where it refuses, the others raise PeerError."""
        if self.is_single:
            return make()
        told: list[Any] = [None, None]
        refusal: Exception | None = None
        if self.is_rank_zero:
            try:
                told[0] = make()
            except (ValueError, RuntimeError, OSError) as error:
                refusal = error
                told[1] = str(error), 2 if isinstance(error, ConfigError) else 1
        dist.broadcast_object_list(told, src=0, group=self.group)
        if refusal is not None:
            raise refusal
        if told[1] is not None:
            raise PeerError(message=told[1][0], status=told[1][1])
        return told[0]

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, on all of them."""
        if self.is_single:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values


class StopSignal:
    """The number of the signal that the ranks stop for: the largest that any of them has received.

    Between steps the exchange costs no time: it runs in the background, and its result is used one step later. It is
    also how a rank notices, within a step, that another has died.
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
        if self.session.is_single:
            return value
        number = torch.tensor([max(self._result(), value)])
        dist.all_reduce(number, dist.ReduceOp.MAX, group=self.session.group)
        return int(number)

    def _result(self) -> int:
        if self.pending is None:
            return 0
        work, number = self.pending
        work.wait()
        self.pending = None
        return int(number)


def open_session(*, device: str, precision: str, local_rank: int | None = None) -> Session:
    """Raises ValueError where the device is not there."""
    chosen = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={device}: torch {torch.__version__} finds no CUDA device; use device=cpu")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={device}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    if chosen.type == "cuda" and local_rank is not None:
        if chosen.index is not None:
            raise ValueError(f"device={device}: several processes have a GPU each; use device=cuda")
        chosen = torch.device("cuda", local_rank % torch.cuda.device_count())  # one alone where Slurm hides the others
    if chosen.type == "cuda":
        torch.set_float32_matmul_precision("high")
    return Session(device=chosen, bf16=has_fast_bf16(chosen) if precision == "auto" else precision == "bf16")


@contextmanager
def open_distributed_session(
    *, device: str, precision: str, strategy: str, environ: Mapping[str, str]
) -> Iterator[Session]:
    """The session of one process, or of one among several, which meet here and part at the end.

    Raises ConfigError where the device is not there, RunError where the others are not found.
    """
    place = process_info(environ) or ProcessInfo()
    if strategy == "single" and place.world_size > 1:
        raise ConfigError([f"strategy=single: {place.world_size} processes were started; use strategy=ddp or fsdp"])
    if strategy == "auto":
        strategy = "ddp" if place.world_size > 1 else "single"
    with as_config_errors():
        local_rank = place.local_rank if place.world_size > 1 else None
        alone = open_session(device=device, precision=precision, local_rank=local_rank)
    if place.world_size == 1 and strategy != "fsdp":
        yield alone
        return
    _init_process_group(place, alone.device, environ)
    group = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
    here = replace(alone, rank=place.rank, world_size=place.world_size, strategy=strategy, group=group)
    try:
        with forward_failures(here):
            yield here
    finally:
        if here.is_single or sys.exc_info()[0] is None:  # to part from ranks that are lost may take for ever
            dist.destroy_process_group()


def _init_process_group(place: ProcessInfo, device: torch.device, environ: Mapping[str, str]) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if place.world_size == 1:
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(BACKENDS[device.type], store=store, rank=0, world_size=1)
        return
    if place.local_size == place.world_size and sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # whatever the name of this host resolves to
    address, port = rendezvous(environ)
    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))
    try:
        dist.init_process_group(
            BACKENDS[device.type],
            init_method="env://",
            rank=place.rank,
            world_size=place.world_size,
            timeout=RENDEZVOUS_TIMEOUT,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise RunError(
            f"the {place.world_size} processes of this run did not find each other at {address}:{port} within "
            f"{RENDEZVOUS_TIMEOUT}: {str(error).splitlines()[0]}. This is rank {place.rank} on {socket.gethostname()}, "
            f"with {environment_summary(environ)}. Set MASTER_ADDR to an address of the first node that all nodes "
            "reach, MASTER_PORT to a free port, and see that every rank is started"
        ) from error


@contextmanager
def forward_failures(here: Session) -> Iterator[None]:
    """What fails on one rank is told to the others, which raise PeerError in place of their own loss of contact."""
    if here.group is None:
        yield
        return
    store = dist.distributed_c10d._get_default_store()
    try:
        yield
    finally:
        error = sys.exc_info()[1]
        if error is not None and is_connection_error(error):
            cause = _cause(store, error)
            who, failed, _ = cause.partition(" failed: ")
            brief = f"stopped: {who} failed, which says why" if failed else ""
            raise PeerError(f"stopped: {cause}", brief=brief) from error
        if error is not None and not isinstance(error, ConfigError) and not getattr(error, "on_all_ranks", False):
            words = str(error) if isinstance(error, RunError) else f"{type(error).__name__}: {error}"
            with suppress(RuntimeError):
                store.set(FAILURE, f"rank {here.rank} on {socket.gethostname()} failed: {words}")


def _cause(store: Any, error: BaseException) -> str:
    """What the rank that failed has told, if it could; the store is lost with rank 0."""
    with suppress(RuntimeError):
        for _ in range(20):
            if store.check([FAILURE]):
                return store.get(FAILURE).decode()
            time.sleep(0.1)
    reason = str(error).splitlines()[0]
    return f"contact with another rank was lost, which has failed or was killed; its own words say why ({reason})"


def is_connection_error(error: BaseException) -> bool:
    """Whether a collective failed, as it does where a rank is gone."""
    if isinstance(error, PeerError):
        return False
    words = "closed by peer", "reset by peer", "Broken pipe", "Timed out waiting", "NCCL communicator was aborted"
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
