"""Checkpoints of a run, found by what they are: folders step_00000012 in checkpoints/. Without torch.

`last`, `best` and `failed` beside them are links for convenience. Where a file system has no links they are small files
with the name of the folder; a copy may lack them, or hold copies of the folders in their place.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def newest(run_folder: Path) -> Path | None:
    """The checkpoint from which a run resumes: that of `last`, else the newest that holds no failed state."""
    root = (run_folder / "checkpoints").resolve()
    if (last := named(root, "last")) is not None:
        return last
    failed = named(root, "failed")
    usable = [path for path in step_folders(root) if not quiet_state(path).get("failed", path == failed)]
    return usable[-1] if usable else None


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
    place, folders = root / name, {path.name: path for path in step_folders(root)}
    if place.is_symlink():
        target = place.resolve()
        return target if target.is_dir() else None
    if place.is_dir():
        step = quiet_state(place).get("step")
        original = folders.get(f"step_{step:08d}") if isinstance(step, int) else None
        return original or (place if step is not None else None)
    if place.is_file():
        return folders.get(place.read_bytes()[:100].decode(errors="replace").strip())
    best = quiet_state(newest(root.parent) or root).get("best") if name == "best" else None
    return folders.get(f"step_{best.get('step'):08d}") if isinstance(best, Mapping) and best.get("step") else None


def locate(path: Path) -> Path | None:
    """The checkpoint that `path` is or stands for, or the newest of a run folder; None if there is none."""
    if path.name in ("last", "best", "failed") and (match := named(path.absolute().parent.resolve(), path.name)):
        return match
    if (path / "state.json").is_file():
        return path.resolve()
    return newest(path.parent.parent if path.name == "last" and path.parent.name == "checkpoints" else path)


def quiet_state(checkpoint: Path) -> dict[str, Any]:
    """The content of state.json, unchecked; empty if it cannot be read."""
    try:
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return state if isinstance(state, dict) else {}
