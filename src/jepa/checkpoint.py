"""Checkpoints: written whole or not at all, checked before they are read, unable to run code.

checkpoints/step_00001000/ holds model.safetensors, optimizer.pt (tensors and numbers only), config.yaml and, written
last, state.json with the digests of the others. `last` and `best` are links to such folders.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from jepa.types import RunError

FORMAT = "jepa-train checkpoint 1"


class CheckpointError(RunError):
    """A checkpoint that cannot be used; the message names it and says what to do."""


def save(
    folder: Path, *, step: int, model: Mapping[str, Tensor], optimizer: Mapping[str, Any], config: str, state: dict
) -> Path:
    """Write checkpoints/step_XXXXXXXX under the run folder and let `last` point to it."""
    root = folder / "checkpoints"
    target = root / f"step_{step:08d}"
    if (root / "last").resolve() == target.resolve() and target.exists():
        return target
    temporary = root / f".writing-{target.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in model.items()}, temporary / "model.safetensors")
    torch.save(dict(optimizer), temporary / "optimizer.pt")
    (temporary / "config.yaml").write_text(config)
    digests = {path.name: _digest(path) for path in sorted(temporary.iterdir())}
    state = {"format": FORMAT, "step": step, **state, "digests": digests}
    (temporary / "state.json").write_text(json.dumps(state, indent=1))
    for path in (*temporary.iterdir(), temporary):
        _flush(path)
    if target.exists():
        shutil.rmtree(target)
    temporary.rename(target)
    link(folder, "last", target)
    return target


def link(folder: Path, name: str, target: Path) -> None:
    """Let checkpoints/`name` point to `target`, atomically."""
    root = folder / "checkpoints"
    temporary = root / f".link-{name}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.name)
    os.replace(temporary, root / name)
    _flush(root)


def prune(folder: Path, *, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints and those that `last` and `best` point to."""
    root = folder / "checkpoints"
    wanted = {(root / name).resolve() for name in ("last", "best")}
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
        f"or a folder with state.json and model.safetensors"
    )


def latest(folder: Path) -> Path | None:
    """The checkpoint to resume the run in `folder` from, None when it has saved nothing yet."""
    last = folder / "checkpoints" / "last"
    if last.is_symlink() or last.exists():
        return find(last)
    return None


def read_state(checkpoint: Path) -> dict:
    """state.json after the digests of all files were found right."""
    try:
        state = json.loads((checkpoint / "state.json").read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise _damaged(checkpoint, f"state.json cannot be read ({error})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT or not isinstance(state.get("digests"), dict):
        raise CheckpointError(f"{checkpoint} was not written by this version of jepa-train: expected format '{FORMAT}'")
    for name, digest in state["digests"].items():
        if not (checkpoint / name).is_file():
            raise _damaged(checkpoint, f"{name} is missing")
        if _digest(checkpoint / name) != digest:
            raise _damaged(checkpoint, f"{name} is not what was written")
    return state


def read_config(checkpoint: Path) -> dict:
    """The resolved configuration of the run that wrote it."""
    return yaml.safe_load((checkpoint / "config.yaml").read_text())


def load_model(checkpoint: Path) -> dict[str, Tensor]:
    try:
        return load_file(checkpoint / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise _damaged(checkpoint, f"model.safetensors: {error}") from error


def load_optimizer(checkpoint: Path) -> dict[str, Any]:
    try:
        return torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise _damaged(checkpoint, f"optimizer.pt: {error}") from error


def _damaged(checkpoint: Path, what: str) -> CheckpointError:
    others = sorted(p.name for p in checkpoint.parent.glob("step_*") if p != checkpoint)
    advice = (
        f"remove this folder and link checkpoints/last to {others[-1]} to resume from there"
        if others
        else "no other checkpoint is beside it: start again under another name="
    )
    return CheckpointError(f"{checkpoint} is damaged: {what}; {advice}")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
