"""Checkpoints: written completely or not at all, verified when read, free of pickled code.

checkpoints/step_00001000/ holds the tensors of model, optimizer and guard (shard-*.safetensors, one set per rank, which
torch.distributed.checkpoint reads on any number of ranks), config.yaml and, written last, state.json with the digests
of the other files. `last` and `best` are links to such folders.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim import Optimizer

from jepa.config.files import Fields, as_mapping, read_json
from jepa.config.paths import CLIP_SHAPE
from jepa.errors import FileError, RunError
from jepa.parallel.session import PeerError, Session
from jepa.types import NonNegativeInt

FORMAT = "jepa-train checkpoint 2"
STATE_FIELDS: Fields = {
    "step": NonNegativeInt,
    "digests": Mapping[str, str],
    "best": dict | None,
    "backbone": str | None,
    "clip_shape": CLIP_SHAPE | None,
    **dict.fromkeys(("mean", "std"), Sequence[float] | None),
    "encoder": dict | None,
}
"""Fields of state.json that are read."""
BEST_FIELDS: Fields = {"metric": str | None, "value": float}
"""Fields of `best` in state.json."""
_READ_ERRORS = (OSError, SafetensorError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError)
_READ_ERRORS += (RecursionError, AssertionError)
"""Exceptions of torch's reader for damaged headers."""


class CheckpointError(RunError):
    """A checkpoint cannot be used; the message names it and says what to do."""


@contextmanager
def as_checkpoint_errors(prefix: str = "") -> Iterator[None]:
    """Raises CheckpointError for a ValueError, with `prefix` before its message."""
    try:
        yield
    except ValueError as error:
        raise CheckpointError(f"{prefix}{error}") from error


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
        if (target.parent / "last").resolve() == target.resolve() and target.exists():
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
        state = {"format": FORMAT, "step": step, **state, "digests": _digests(sorted(temporary.iterdir()))}
        (temporary / "state.json").write_text(json.dumps(state, indent=1))
        for path in (*temporary.iterdir(), temporary):
            _flush(path)
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
        _link(target, links)
        prune(self.folder, keep=self.keep)

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
            last = self.folder / "checkpoints" / "last"
            previous = f"intact: {last.resolve().name}" if last.exists() else "none"
            raise SaveError(
                f"step {step} could not be saved in {last.parent}: {reason}. Previous checkpoint: {previous}; "
                "fix this and run the same command again"
            ) from error


def checkpoint_folder(folder: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` steps."""
    return folder / "checkpoints" / f"step_{step:08d}"


def _temporary(target: Path) -> Path:
    return target.with_name(f".writing-{target.name}")


def _link(target: Path, names: Sequence[str]) -> None:
    """Let the links `names` beside `target` point to it, atomically."""
    for name in names:
        temporary = target.with_name(f".link-{name}")
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target.name)
        os.replace(temporary, target.with_name(name))
    _flush(target.parent)


def prune(folder: Path, *, keep: int) -> None:
    """Delete all checkpoints but the newest `keep` and those that a link points to, and incomplete ones."""
    root = folder / "checkpoints"
    linked = {path.resolve() for path in root.iterdir() if path.is_symlink()}
    for old in sorted(root.glob("step_*"))[:-keep]:
        if old.resolve() not in linked:
            shutil.rmtree(old)
    for leftover in root.glob(".writing-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def find(path: Path) -> Path:
    """The last checkpoint of a run folder, or the checkpoint folder that `path` is or links to; or CheckpointError."""
    for candidate in (path, path / "checkpoints" / "last"):
        if (candidate / "state.json").is_file():
            return candidate.resolve()
    expected = "expected a run folder (outputs/NAME) with checkpoints/last, or a folder with state.json and tensors"
    problem = "is no checkpoint of jepa-train" if path.exists() else "does not exist"
    raise CheckpointError(f"{path.resolve()} {problem}: {expected}")


def latest(folder: Path) -> Path | None:
    """The last checkpoint of the run in `folder`; None if it has saved none yet."""
    last = folder / "checkpoints" / "last"
    return find(last) if last.is_symlink() or last.exists() else None


def read_state(checkpoint: Path) -> dict:
    """state.json, after all files are read and their digests compared; raises CheckpointError."""
    state = peek(checkpoint)
    for name in state["digests"]:
        if Path(name).name != name:
            raise _damaged(checkpoint, f"state.json names {name}, which is not a file of the checkpoint")
    digests = _digests([path for name in state["digests"] if (path := checkpoint / name).is_file()])
    for name, digest in state["digests"].items():
        if digests.get(name) != digest:
            fault = "has changed since it was written" if name in digests else "is missing"
            raise _damaged(checkpoint, f"{name} {fault}")
    return state


def peek(checkpoint: Path) -> dict:
    """state.json without a check of the other files."""
    path = checkpoint / "state.json"
    try:
        state = read_json(path)
        if state.get("format") == FORMAT:
            as_mapping(state, path, STATE_FIELDS)
            as_mapping(state.get("best") or {"value": 0.0}, f"{path}: best", BEST_FIELDS)
    except FileError as error:
        raise _damaged(checkpoint, f"{error}") from error
    if state.get("format") != FORMAT:
        raise CheckpointError(f"{checkpoint} was not written by this version of jepa-train: expected format '{FORMAT}'")
    return state


def training_tensors(model: nn.Module, optimizer: Optimizer, guard: nn.Module | None) -> dict[str, Tensor]:
    """State of model, optimizer and guard by name; with FSDP, the shards of this rank."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter, {})
        tensors |= {f"optimizer.{name}.{key}": value for key, value in state.items() if isinstance(value, Tensor)}
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
        raise _damaged(checkpoint, f"its headers state {sum(sizes):,} bytes of tensors, its files have {in_files:,}")
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
        raise _damaged(checkpoint, f"its tensors cannot be read ({' '.join(str(error).split())[:240]})") from error


def _damaged(checkpoint: Path, what: str) -> CheckpointError:
    advice = "there is no other checkpoint: start again with another name="
    if siblings := sorted(path.name for path in checkpoint.parent.glob("step_*") if path != checkpoint):
        advice = f"remove this folder and link checkpoints/last to {siblings[-1]} to resume from there"
    return CheckpointError(f"{checkpoint} is damaged: {what}; {advice}")


def _digests(paths: Sequence[Path]) -> dict[str, str]:
    """File name -> SHA-256, computed in 8 threads."""
    with ThreadPoolExecutor(8) as pool:
        return dict(zip((path.name for path in paths), pool.map(_digest, paths), strict=True))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
