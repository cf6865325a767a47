"""Checkpoints: written completely or not at all, verified when read, free of pickled code.

checkpoints/step_00001000/ holds the tensors of model, optimizer and guard (shard-*.safetensors, one set per rank, which
torch.distributed.checkpoint reads on any number of ranks), config.yaml and, written last, state.json with the digests
of the other files and a checksum of its own. `last` and `best` are links to such folders, or files with their names
where the file system has no links; without them the newest folder is taken (see `jepa.config.checkpoints`).
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim import Optimizer

from jepa.config.checkpoints import named, newest, quiet_state, real, step_folders, step_of
from jepa.parallel.session import PeerError, Session
from jepa.runs.state import (
    FORMAT,
    CheckpointError,
    as_checkpoint_errors,
    damaged,
    digests_of,
    fault_of,
    find,
    peek,
    previous_whole,
    read_state,
    with_checksum,
)

log = logging.getLogger(__name__)
_READ_ERRORS = (OSError, SafetensorError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError)
_READ_ERRORS += (RecursionError, AssertionError)
"""Exceptions of torch's reader for damaged headers."""
latest = newest
__all__ = ["CheckpointError", "as_checkpoint_errors", "find", "latest", "peek", "read_state", "with_checksum"]
UNSUPPORTED = {errno.EPERM, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK}
"""Numbers of the errors of a file system that does not offer links, locks or the flushing of folders."""


class SaveError(CheckpointError):
    """A checkpoint could not be written."""

    on_all_ranks = True


class Writer:
    """Writes the checkpoints of the run in `folder`; all ranks make the same calls.

    With `asynchronous`, `save` copies the tensors to host memory and they are written during training; an error is then
    raised by the next `save` or `finish`. Raises SaveError, on all ranks.
    """

    def __init__(self, folder: Path, session: Session, *, keep: int, asynchronous: bool = False) -> None:
        self.folder, self.session, self.keep, self.asynchronous = folder, session, keep, asynchronous
        self.pending: tuple[int, Future[None]] | None = None
        self.group: Any = session.group
        if asynchronous and session.group is not None:  # not to interfere with the collectives of the training
            self.group = torch.distributed.new_group(backend="gloo")

    def save(
        self, *, step: int, tensors: Mapping[str, Tensor], config: str, state: dict, links: Sequence[str] = ("last",)
    ) -> None:
        """Write checkpoints/step_XXXXXXXX, then let `links` point to it."""
        self.finish()
        seal = partial(self._seal, step, config, state, links)
        with self._save_errors(step):
            if self.session.broadcast_from_rank_zero(partial(self._prepare, step, links)):
                return
            writing = self._write(step, dict(tensors))
            if writing is None:
                self.session.broadcast_from_rank_zero(seal)
            else:
                self.pending = step, ThreadPoolExecutor(1).submit(self._seal_after, writing, seal)

    def finish(self) -> None:
        """Wait until the pending checkpoint is written."""
        if self.pending is None:
            return
        (step, done), self.pending = self.pending, None
        with self._save_errors(step):
            if not isinstance(done.exception(), OSError):  # raised by `_seal`, on rank 0 only
                done.result()
            self.session.broadcast_from_rank_zero(done.result)

    def _prepare(self, step: int, links: Sequence[str]) -> bool:
        """Create the temporary folder; if the checkpoint exists already, only update the links and return True."""
        target = checkpoint_folder(self.folder, step)
        if named(real(target.parent), "last") == real(target):
            _link(target, links)
            return True
        shutil.rmtree(_temporary(target), ignore_errors=True)
        _temporary(target).mkdir(parents=True)
        return False

    def _write(self, step: int, tensors: dict[str, Tensor]) -> Any:
        """Write the tensors of all ranks; returns a future if asynchronous."""
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
        from torch.distributed.checkpoint.state_dict_saver import async_save, save

        writer = HuggingFaceStorageWriter(str(_temporary(checkpoint_folder(self.folder, step))), save_distributed=True)
        save_fn = async_save if self.asynchronous else save
        written = save_fn(tensors, storage_writer=writer, process_group=self.group, no_dist=_is_single(self.group))
        return written if self.asynchronous else None

    def _seal_after(self, writing: Future, seal: Callable[[], None]) -> None:
        writing.result()
        if self.session.is_rank_zero:
            seal()

    def _seal(self, step: int, config: str, state: dict, links: Sequence[str]) -> None:
        """Add config.yaml and state.json, give the folder its final name, update links, delete old checkpoints."""
        target = checkpoint_folder(self.folder, step)
        temporary = _temporary(target)
        (temporary / "config.yaml").write_text(config, encoding="utf-8")
        state = {"format": FORMAT, "step": step, **state, "digests": digests_of(sorted(temporary.iterdir()))}
        (temporary / "state.json").write_text(json.dumps(with_checksum(state), indent=1))
        for path in (*temporary.iterdir(), temporary):
            _flush(path)
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
        _link(target, links)
        prune(self.folder, keep=self.keep, current=target)

    @contextmanager
    def _save_errors(self, step: int) -> Iterator[None]:
        """Turn failures into SaveError and delete the temporary folder; earlier checkpoints are not touched."""
        from torch.distributed.checkpoint.api import CheckpointException

        try:
            yield
        except (CheckpointException, SafetensorError, OSError, PeerError) as error:
            failures = list(error.failures.values()) if isinstance(error, CheckpointException) else []
            reason = failures[0][0] if failures else error
            if self.session.is_rank_zero:
                shutil.rmtree(_temporary(checkpoint_folder(self.folder, step)), ignore_errors=True)
            last = newest(self.folder)
            previous = f"intact: {last.name}" if last else "none"
            raise SaveError(
                f"step {step} could not be saved in {self.folder / 'checkpoints'}: {reason}. Previous checkpoint: "
                f"{previous}; fix this and run the same command again"
            ) from error


def checkpoint_folder(folder: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` steps."""
    return folder / "checkpoints" / f"step_{step:08d}"


def _temporary(target: Path) -> Path:
    return target.with_name(f".writing-{target.name}")


def _link(target: Path, names: Sequence[str]) -> None:
    """Let the links `names` beside `target` point to it, atomically; files with its name where there are no links."""
    for name in names:
        place, temporary = target.with_name(name), target.with_name(f".link-{name}")
        temporary.unlink(missing_ok=True)
        try:
            temporary.symlink_to(target.name)
        except OSError as error:
            if error.errno not in UNSUPPORTED | {errno.EACCES}:
                raise
            temporary.write_text(target.name)
            _warn_once(f"{target.parent} has no links ({error.strerror}): {name} is a file with the checkpoint's name")
        if place.is_dir() and not place.is_symlink():
            _put_aside(place)
        os.replace(temporary, place)
    _flush(target.parent)


def _put_aside(copied: Path) -> None:
    """Make room for a link where a copy of a run holds a copied folder, which is kept unless it is a duplicate."""
    state = quiet_state(copied)
    original = copied.with_name(f"step_{state['step']:08d}") if isinstance(state.get("step"), int) else None
    if original and not original.exists():
        copied.rename(original)
    elif original and quiet_state(original) == state and fault_of(original) is None:
        shutil.rmtree(copied)
    else:
        number = next(n for n in range(1, 10**6) if not copied.with_name(f"copied-{copied.name}-{n}").exists())
        copied.rename(copied.with_name(f"copied-{copied.name}-{number}"))


@cache
def _warn_once(message: str) -> None:
    log.warning("%s", message)


def prune(folder: Path, *, keep: int, current: Path) -> None:
    """Delete the complete checkpoints before `current` but the newest `keep` and those with a name, and leftovers.

    Later and incomplete ones stay: they are there because the run was copied or has resumed from an earlier one.
    """
    root = real(current.parent)
    kept = {path for name in ("last", "best", "failed") if (path := named(root, name))}
    kept |= {real(path) for path in root.iterdir() if path.is_symlink()}
    complete = [path for path in step_folders(root) if (path / "state.json").is_file()]
    for old in [path for path in complete if step_of(path) <= step_of(current)][:-keep]:
        if old not in kept:
            shutil.rmtree(old)
    for leftover in root.glob(".writing-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def latest_whole(folder: Path) -> Path | None:
    """The checkpoint to resume from with resume=previous: damaged ones at the end are renamed damaged-step_*.

    Raises CheckpointError if none is whole.
    """
    last = newest(folder)
    if last is None or (fault := fault_of(last)) is None:
        return last
    if (previous := previous_whole(last)) is None:
        raise damaged(last, fault)
    for path in step_folders(last.parent):
        if step_of(path) > step_of(previous) and fault_of(path) is not None:
            path.rename(path.with_name(f"damaged-{path.name}"))
    _link(previous, ("last",))
    log.warning("%s is damaged: %s; it is kept as damaged-%s", last, fault, last.name)
    return previous


def training_tensors(model: nn.Module, optimizer: Optimizer, guard: nn.Module | None) -> dict[str, Tensor]:
    """State of model, optimizer and guard by name; with FSDP, the shards of this rank."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter, {})
        tensors |= {f"optimizer.{name}.{key}": value for key, value in state.items() if isinstance(value, Tensor)}
    for number, group in enumerate(optimizer.param_groups):  # where LAMB counts its steps
        tensors |= {f"group.{number}.{key}": value for key, value in group.items() if isinstance(value, Tensor)}
    return tensors | {f"guard.{name}": tensor for name, tensor in (guard.state_dict() if guard else {}).items()}


def restore(
    checkpoint: Path, model: nn.Module, optimizer: Optimizer, guard: nn.Module | None, group: Any = None
) -> None:
    """Load a checkpoint, written by any number of ranks, into a run that has not started; all ranks call it."""
    parameters = dict(model.named_parameters())
    for name, (shape, dtype) in _stored(checkpoint, "optimizer.").items():
        parameter_name, _, key = name.rpartition(".")
        if parameter_name not in parameters:
            raise CheckpointError(f"{checkpoint}: optimizer state of {parameter_name}, which this model does not have")
        parameter = parameters[parameter_name]
        empty = torch.zeros_like(parameter) if shape == parameter.shape else torch.zeros(shape, dtype=dtype)
        if empty.ndim == 0 and optimizer.defaults.get("fused"):
            empty = empty.to(parameter.device)
        optimizer.state[parameter][key] = empty
    for name, (shape, dtype) in _stored(checkpoint, "group.").items():
        number, _, key = name.partition(".")
        optimizer.param_groups[int(number)][key] = torch.zeros(shape, dtype=dtype)
    tensors = training_tensors(model, optimizer, guard)
    if differing := _stored(checkpoint, "model.").keys() ^ model.state_dict().keys():
        names = ", ".join(sorted(differing)[:3])
        raise CheckpointError(f"{checkpoint} is of another model: only one of the two has {names}")
    _load(checkpoint, tensors, group)


def load_model(checkpoint: Path, prefix: str = "") -> dict[str, Tensor]:
    """Full model tensors whose names start with `prefix`, on the CPU, under their names without the prefix."""
    stored = _stored(checkpoint, f"model.{prefix}")
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in stored.items()}
    _load(checkpoint, {f"model.{prefix}{name}": tensor for name, tensor in tensors.items()}, None)
    return tensors


def _stored(checkpoint: Path, prefix: str) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of the stored tensors whose names start with `prefix`, without the prefix."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    with _reading(checkpoint):
        metadata: Any = HuggingFaceStorageReader(str(checkpoint)).read_metadata().state_dict_metadata
        in_files = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
        sizes = [math.prod(tensor.size) * tensor.properties.dtype.itemsize for tensor in metadata.values()]
    if min(sizes, default=0) < 0 or sum(sizes) > in_files:
        raise damaged(checkpoint, f"its headers state {sum(sizes):,} bytes of tensors, its files have {in_files:,}")
    return {
        name.removeprefix(prefix): (tensor.size, tensor.properties.dtype)
        for name, tensor in metadata.items()
        if name.startswith(prefix)
    }


def _load(checkpoint: Path, tensors: dict[str, Tensor], group: Any) -> None:
    """Read the stored values into `tensors`, in place."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    with _reading(checkpoint):
        reader = HuggingFaceStorageReader(str(checkpoint))
        load(tensors, storage_reader=reader, process_group=group, no_dist=_is_single(group))


def _is_single(group: Any) -> bool:
    """True without other processes; also silences PyTorch's warning about that, in all threads."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    return group is None


@contextmanager
def _reading(checkpoint: Path) -> Iterator[None]:
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except (CheckpointException, *_READ_ERRORS) as error:
        raise damaged(checkpoint, f"its tensors cannot be read ({' '.join(str(error).split())[:240]})") from error


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some file systems flush no folders
        if not path.is_dir() or error.errno not in UNSUPPORTED:
            raise
    finally:
        os.close(descriptor)
