"""state.json of a checkpoint: read, compared with the digests of the other files, and the advice if one is damaged."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jepa.config.checkpoints import locate, quiet_state, real, step_folders, step_of
from jepa.config.files import Fields, as_mapping, read_json
from jepa.config.paths import CLIP_SHAPE
from jepa.errors import FileError, RunError
from jepa.types import NonNegativeInt

FORMAT = "jepa-train checkpoint 2"
STATE_FIELDS: Fields = {
    "step": NonNegativeInt, "digests": Mapping[str, str], "best": dict | None, "backbone": str | None,
    "clip_shape": CLIP_SHAPE | None, **dict.fromkeys(("mean", "std"), Sequence[float] | None), "encoder": dict | None,
    "threads": int | None,
}  # fmt: skip
"""Fields of state.json that are read."""
BEST_FIELDS: Fields = {"metric": str | None, "value": float}
"""Fields of `best` in state.json."""
DATA_FIELDS: Fields = {"num_samples": NonNegativeInt, "classes": Sequence[str], "digest": str, "files": str | None}
"""Fields of `data` in state.json, as `jepa.data.identity` describes a data set."""


class CheckpointError(RunError):
    """A checkpoint cannot be used; the message names it and says what to do."""


@contextmanager
def as_checkpoint_errors(prefix: str = "") -> Iterator[None]:
    """Raises CheckpointError for a ValueError, with `prefix` before its message."""
    try:
        yield
    except ValueError as error:
        raise CheckpointError(f"{prefix}{error}") from error


def find(path: Path) -> Path:
    """The last checkpoint of a run folder, or the checkpoint folder that `path` is or links to; or CheckpointError."""
    if (checkpoint := locate(path)) is not None:
        return checkpoint
    expected = "expected a run folder (outputs/NAME) with checkpoints, or a folder with state.json and tensors"
    problem = "is no checkpoint of jepa-train" if path.exists() else "does not exist"
    raise CheckpointError(f"{real(path)} {problem}: {expected}")


def previous_whole(checkpoint: Path) -> Path | None:
    """The newest whole checkpoint before this one; None if there is none."""
    return newest_whole([path for path in step_folders(checkpoint.parent) if step_of(path) < step_of(checkpoint)])


def newest_whole(checkpoints: Sequence[Path]) -> Path | None:
    whole = (path for path in reversed(checkpoints) if not quiet_state(path).get("failed") and fault_of(path) is None)
    return next(whole, None)


def read_state(checkpoint: Path) -> dict:
    """state.json, after all files are read and their digests compared; raises CheckpointError."""
    state = peek(checkpoint)
    if fault := fault_of(checkpoint):
        raise damaged(checkpoint, fault)
    return state


def peek(checkpoint: Path) -> dict:
    """state.json, its checksum compared, without a check of the other files."""
    path = checkpoint / "state.json"
    try:
        state = read_json(path)
        if state.get("format") == FORMAT:
            as_mapping(state, path, STATE_FIELDS)
            as_mapping(state.get("best") or {"value": 0.0}, f"{path}: best", BEST_FIELDS)
            if state.get("data") is not None:
                as_mapping(state["data"], f"{path}: data", DATA_FIELDS)
    except FileError as error:
        raise damaged(checkpoint, f"{error}") from error
    if state.get("format") != FORMAT and "checksum" not in state:
        raise CheckpointError(f"{checkpoint} was not written by this version of jepa-train: expected format '{FORMAT}'")
    if state.get("format") != FORMAT or not _has_its_checksum(state):
        raise damaged(checkpoint, "state.json has changed since it was written")
    return state


def with_checksum(state: Mapping[str, Any]) -> dict[str, Any]:
    """The content of state.json with its checksum, as the last key."""
    rest = {key: value for key, value in state.items() if key != "checksum"}
    return rest | {"checksum": hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()}


def _has_its_checksum(state: Mapping[str, Any]) -> bool:
    """True for a state as it was written; those of earlier versions end with the digests and have no checksum."""
    *_, last = state
    return last == "digests" or (last == "checksum" and with_checksum(state) == state)


def fault_of(checkpoint: Path) -> str | None:
    """What is wrong with the files of a checkpoint, all of which are read; None if it is whole."""
    state = quiet_state(checkpoint)
    if state.get("format") != FORMAT or not isinstance(state.get("digests"), dict) or not _has_its_checksum(state):
        return "state.json is missing or has changed since it was written"
    if elsewhere := next((name for name in state["digests"] if Path(name).name != name), None):
        return f"state.json names {elsewhere}, which is not a file of the checkpoint"
    digests = digests_of([path for name in state["digests"] if (path := checkpoint / name).is_file()])
    for name, digest in state["digests"].items():
        if digests.get(name) != digest:
            return f"{name} {'has changed since it was written' if name in digests else 'is missing'}"
    return None


def damaged(checkpoint: Path, what: str) -> CheckpointError:
    advice = "there is no other checkpoint: start again with another name="
    siblings = step_folders(checkpoint.parent)
    if checkpoint in siblings and (previous := previous_whole(checkpoint)):
        advice = f"{previous.name} is whole: resume=previous resumes the run from there"
    elif other := newest_whole([path for path in siblings if path != checkpoint]):
        advice = f"{other.name} is whole"
    return CheckpointError(f"{checkpoint} is damaged: {what}; {advice}")


def digests_of(paths: Sequence[Path]) -> dict[str, str]:
    """File name -> SHA-256, computed in 8 threads."""
    with ThreadPoolExecutor(8) as pool:
        return dict(zip((path.name for path in paths), pool.map(_digest, paths), strict=True))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
