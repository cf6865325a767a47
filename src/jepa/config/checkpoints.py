"""Checkpoints of a run, found by what they are: folders step_00000012 in checkpoints/. Without torch.

`last`, `best` and `failed` beside them are links for convenience. Where a file system has no links they are small files
with the name of the folder; a copy may lack them, or hold copies of the folders in their place.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def newest(run_folder: Path) -> Path | None:
    """The checkpoint from which a run resumes: that of `last`, else the newest that holds no failed state."""
    root = real(run_folder / "checkpoints")
    if (last := named(root, "last")) is not None:
        return last
    failed = named(root, "failed")
    usable = [path for path in step_folders(root) if not quiet_state(path).get("failed", path == failed)]
    return usable[-1] if usable else None


def real(path: Path) -> Path:
    """As `Path.resolve`, which raises RuntimeError for a link that leads round in a circle."""
    return Path(os.path.realpath(path))


def step_folders(root: Path) -> list[Path]:
    """The folders step_00000012 in `root`, in the order of their steps."""
    if not root.is_dir():
        return []
    matches = [path for path in root.iterdir() if re.fullmatch(r"step_\d+", path.name) and path.is_dir()]
    return sorted((path for path in matches if not path.is_symlink()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step in the name of a checkpoint's folder."""
    return int(checkpoint.name.removeprefix("step_"))


def named(root: Path, name: str) -> Path | None:
    """The checkpoint that the link, file or copied folder `name` stands for; None if that is not there."""
    path, folders = root / name, {folder.name: folder for folder in step_folders(root)}
    if path.is_symlink():
        target = real(path)
        return target if target.is_dir() else None
    if path.is_dir():
        step = quiet_state(path).get("step")
        original = folders.get(f"step_{step:08d}") if isinstance(step, int) else None
        return original or (path if step is not None else None)
    if path.is_file():
        return folders.get(path.read_bytes()[:100].decode(errors="replace").strip())
    best = quiet_state(newest(root.parent) or root).get("best") if name == "best" else None
    step = best.get("step") if isinstance(best, Mapping) else None
    return folders.get(f"step_{step:08d}") if isinstance(step, int) else None


def locate(path: Path) -> Path | None:
    """The checkpoint that `path` is or stands for, or the newest of a run folder; None if there is none."""
    if path.name in ("last", "best", "failed") and (match := named(real(path.absolute().parent), path.name)):
        return match
    if (path / "state.json").is_file():
        return real(path)
    return newest(path.parent.parent if path.name == "last" and path.parent.name == "checkpoints" else path)


def quiet_state(checkpoint: Path) -> dict[str, Any]:
    """The content of state.json, unchecked; empty if it cannot be read."""
    try:
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return state if isinstance(state, dict) else {}
