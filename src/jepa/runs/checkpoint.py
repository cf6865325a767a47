"""Checkpoints: written whole or not at all, checked before they are read, unable to run code.

checkpoints/step_00001000/ holds the tensors of model, optimizer and guard (shard-*.safetensors, of each rank what lay
on it; torch.distributed.checkpoint puts them together for any number of ranks), config.yaml and, written last,
state.json with the digests of the others. `last` and `best` are links to such folders.
"""

from __future__ import annotations

import hashlib
import json
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

from jepa.errors import RunError
from jepa.parallel.session import PeerError, Session

FORMAT = "jepa-train checkpoint 2"


class CheckpointError(RunError):
    """A checkpoint that cannot be used; the message names it and says what to do."""


class SaveError(CheckpointError):
    """A checkpoint that could not be written."""

    on_all_ranks = True


class Writer:
    """Writes the checkpoints of the run in `folder`; all ranks call it alike.

    With `beside`, what is saved is copied to host memory and written while the training goes on; a failure then shows
    at the next save or at the end. Raises SaveError, on all ranks.
    """

    def __init__(self, folder: Path, session: Session, *, keep: int, beside: bool = False) -> None:
        self.folder, self.session, self.keep, self.beside = folder, session, keep, beside
        self.pending: tuple[int, Future[None]] | None = None
        self.group = session.group
        if beside and session.group is not None:  # the training's own collectives go on meanwhile
            self.group = torch.distributed.new_group(backend="gloo")

    def save(
        self, *, step: int, tensors: Mapping[str, Tensor], config: str, state: dict, links: Sequence[str] = ("last",)
    ) -> None:
        """Write checkpoints/step_XXXXXXXX; `links` point to it once it is whole."""
        self.finish()
        seal = partial(self._seal, step, config, state, links)
        with self._failing(step):
            if self.session.broadcast_from_rank_zero(partial(self._begin, step, links)):
                return
            written = self._write(step, dict(tensors))
            if written is None:
                self.session.broadcast_from_rank_zero(seal)
            else:
                self.pending = step, _then(written, seal if self.session.is_rank_zero else None)

    def finish(self) -> None:
        """Wait for what is being written."""
        if self.pending is None:
            return
        (step, done), self.pending = self.pending, None
        with self._failing(step):
            if not isinstance(done.exception(), OSError):  # which only rank 0 has, from sealing
                done.result()
            self.session.broadcast_from_rank_zero(done.result)

    def _begin(self, step: int, links: Sequence[str]) -> bool:
        """Whether this step is there already; else makes room for it."""
        target = place_of(self.folder, step)
        if (target.parent / "last").resolve() == target.resolve() and target.exists():
            for name in links:
                link(self.folder, name, target)
            return True
        shutil.rmtree(_unsealed(target), ignore_errors=True)
        _unsealed(target).mkdir(parents=True)
        return False

    def _write(self, step: int, tensors: dict[str, Tensor]) -> Any:
        """The tensors of all ranks; a future of torch.distributed.checkpoint where that goes on beside the training."""
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
        from torch.distributed.checkpoint.state_dict_saver import async_save, save

        writer = HuggingFaceStorageWriter(str(_unsealed(place_of(self.folder, step))), save_distributed=True)
        options: dict[str, Any] = {"storage_writer": writer, "process_group": self.group}
        if self.beside:
            return async_save(tensors, no_dist=_is_alone(self.group), **options)
        save(tensors, no_dist=_is_alone(self.group), **options)
        return None

    def _seal(self, step: int, config: str, state: dict, links: Sequence[str]) -> None:
        """What makes it a checkpoint."""
        target = place_of(self.folder, step)
        temporary = _unsealed(target)
        (temporary / "config.yaml").write_text(config)
        state = {"format": FORMAT, "step": step, **state, "digests": _digests(sorted(temporary.iterdir()))}
        (temporary / "state.json").write_text(json.dumps(state, indent=1))
        for path in (*temporary.iterdir(), temporary):
            _flush(path)
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
        for name in links:
            link(self.folder, name, target)
        prune(self.folder, keep=self.keep)

    @contextmanager
    def _failing(self, step: int) -> Iterator[None]:
        """What goes wrong leaves the earlier checkpoints as they are."""
        from torch.distributed.checkpoint.api import CheckpointException

        try:
            yield
        except (CheckpointException, SafetensorError, OSError, PeerError) as error:
            failures = list(error.failures.values()) if isinstance(error, CheckpointException) else []
            reason = failures[0][0] if failures else error
            if self.session.is_rank_zero:
                shutil.rmtree(_unsealed(place_of(self.folder, step)), ignore_errors=True)
            raise SaveError(
                f"step {step} could not be saved in {self.folder}/checkpoints: {reason}. {_resumable(self.folder)}; "
                "mend this and run the same command again"
            ) from error


def _then(written: Future, seal: Callable[[], None] | None) -> Future[None]:
    """Both in the background."""

    def wait() -> None:
        written.result()
        if seal is not None:
            seal()

    executor = ThreadPoolExecutor(1)
    done = executor.submit(wait)
    executor.shutdown(wait=False)
    return done


def place_of(folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps lies."""
    return folder / "checkpoints" / f"step_{step:08d}"


def _unsealed(target: Path) -> Path:
    return target.with_name(f".writing-{target.name}")


def _resumable(folder: Path) -> str:
    last = folder / "checkpoints" / "last"
    return f"The checkpoint before it is whole: {last.resolve().name}" if last.exists() else "There was none before it"


def link(folder: Path, name: str, target: Path) -> None:
    """Let checkpoints/`name` point to `target`, atomically."""
    root = folder / "checkpoints"
    temporary = root / f".link-{name}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.name)
    os.replace(temporary, root / name)
    _flush(root)


def prune(folder: Path, *, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints and those that a link points to."""
    root = folder / "checkpoints"
    wanted = {path.resolve() for path in root.iterdir() if path.is_symlink()}
    for old in sorted(root.glob("step_*"))[:-keep]:
        if old.resolve() not in wanted:
            shutil.rmtree(old)
    for leftover in root.glob(".writing-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def find(path: Path) -> Path:
    """The checkpoint folder meant by a run folder, a checkpoint folder or a link to one; CheckpointError if none."""
    for candidate in (path, path / "checkpoints" / "last"):
        if (candidate / "state.json").is_file():
            return candidate.resolve()
    if not path.exists():
        raise CheckpointError(
            f"{path.absolute()} does not exist: expected a run folder (outputs/NAME) or a checkpoint in it"
        )
    raise CheckpointError(
        f"{path.resolve()} is no checkpoint of jepa-train: expected a run folder with checkpoints/last, "
        f"or a folder with state.json and shards of tensors"
    )


def latest(folder: Path) -> Path | None:
    """The checkpoint to resume the run in `folder` from, None when it has saved nothing yet."""
    last = folder / "checkpoints" / "last"
    if last.is_symlink() or last.exists():
        return find(last)
    return None


def read_state(checkpoint: Path) -> dict:
    """state.json after the digests of all files were found right, for which each of them is read."""
    state = peek(checkpoint)
    for name in state["digests"]:
        if not (checkpoint / name).is_file():
            raise _damaged(checkpoint, f"{name} is missing")
    for name, digest in _digests([checkpoint / name for name in state["digests"]]).items():
        if digest != state["digests"][name]:
            raise _damaged(checkpoint, f"{name} is not what was written")
    return state


def peek(checkpoint: Path) -> dict:
    """state.json alone: enough for a checkpoint that has been checked."""
    try:
        state = json.loads((checkpoint / "state.json").read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise _damaged(checkpoint, f"state.json cannot be read ({error})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT or not isinstance(state.get("digests"), dict):
        raise CheckpointError(f"{checkpoint} was not written by this version of jepa-train: expected format '{FORMAT}'")
    return state


def training_tensors(model: nn.Module, optimizer: Optimizer, guard: nn.Module | None) -> dict[str, Tensor]:
    """All that a run needs to go on, by name; with shards, this rank's."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        kept = optimizer.state.get(parameter, {})
        tensors |= {f"optimizer.{name}.{key}": value for key, value in kept.items() if isinstance(value, Tensor)}
    return tensors | {f"guard.{name}": tensor for name, tensor in (guard.state_dict() if guard else {}).items()}


def restore(
    checkpoint: Path, model: nn.Module, optimizer: Optimizer, guard: nn.Module | None, group: Any = None
) -> None:
    """Put a checkpoint into a run that has not begun, whatever number of ranks has written it; all call it alike."""
    parameters = dict(model.named_parameters())
    for name, (shape, dtype) in _stored(checkpoint, "optimizer.").items():
        of, _, key = name.rpartition(".")
        if of not in parameters:
            raise CheckpointError(f"{checkpoint}: optimizer state of {of}, which this model does not have")
        parameter = parameters[of]
        empty = torch.zeros_like(parameter) if shape == parameter.shape else torch.zeros(shape, dtype=dtype)
        if empty.ndim == 0 and optimizer.defaults.get("fused"):
            empty = empty.to(parameter.device)
        optimizer.state[parameter][key] = empty
    tensors = training_tensors(model, optimizer, guard)
    differing = _stored(checkpoint, "model.").keys() ^ model.state_dict().keys()
    if differing:
        raise CheckpointError(f"{checkpoint} is of another model: {', '.join(sorted(differing)[:3])} is in one alone")
    _load(checkpoint, tensors, group)


def load_model(checkpoint: Path, prefix: str = "") -> dict[str, Tensor]:
    """Whole tensors of the model, on the CPU: those whose name begins with `prefix`, by the rest of it."""
    stored = _stored(checkpoint, f"model.{prefix}")
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in stored.items()}
    _load(checkpoint, {f"model.{prefix}{name}": tensor for name, tensor in tensors.items()}, None)
    return tensors


def _stored(checkpoint: Path, prefix: str) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and type of the tensors whose names begin so, by the rest of the name."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    with _reading(checkpoint):
        found: Any = HuggingFaceStorageReader(str(checkpoint)).read_metadata().state_dict_metadata
    chosen = {name.removeprefix(prefix): tensor for name, tensor in found.items() if name.startswith(prefix)}
    return {name: (tensor.size, tensor.properties.dtype) for name, tensor in chosen.items()}


def _load(checkpoint: Path, into: dict[str, Tensor], group: Any) -> None:
    """In place."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    with _reading(checkpoint):
        reader = HuggingFaceStorageReader(str(checkpoint))
        load(into, storage_reader=reader, process_group=group, no_dist=_is_alone(group))


def _is_alone(group: Any) -> bool:
    """Whether there is no other process, which is no reason for a warning, in this thread or another."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    return group is None


@contextmanager
def _reading(checkpoint: Path) -> Iterator[None]:
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except (CheckpointException, OSError, SafetensorError, ValueError) as error:
        raise _damaged(checkpoint, f"its tensors cannot be read ({error})") from error


def _damaged(checkpoint: Path, what: str) -> CheckpointError:
    others = sorted(p.name for p in checkpoint.parent.glob("step_*") if p != checkpoint)
    advice = (
        f"remove this folder and link checkpoints/last to {others[-1]} to resume from there"
        if others
        else "no other checkpoint is beside it: start again under another name="
    )
    return CheckpointError(f"{checkpoint} is damaged: {what}; {advice}")


def _digests(paths: Sequence[Path]) -> dict[str, str]:
    """SHA-256 of the files, several at a time."""
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
