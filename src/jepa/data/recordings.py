"""Recordings of other origin: what a format hands over to be stored, and what the formats share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from jepa.data.episode_store import Episode, StoreFacts
from jepa.errors import FileError
from jepa.types import ActionSpace

ONE_FRAME = "episodes of one frame"


@dataclass(frozen=True)
class Recording:
    """Episodes that are read one by one."""

    facts: StoreFacts
    lengths: Sequence[int]
    """Number of transitions of each episode."""
    read: Callable[[int], Episode]
    """Number of an episode -> its frames and transitions. Raises FileError if a file is damaged."""
    left_out: Counter[str]


def require(kind: str, *packages: str) -> None:
    """Raises FileError if a package is not installed."""
    if missing := [package for package in packages if find_spec(package) is None]:
        raise FileError(f"{kind} needs {' and '.join(missing)}: pip install 'jepa-train[episodes]'")


def choose_camera(cameras: Iterable[str], key: str, where: str) -> str:
    """The only camera, or the one named `key`. Raises FileError with the choices."""
    cameras = list(cameras)
    if not cameras:
        raise FileError(f"{where} has no camera: frames are what is learned from")
    if key and key not in cameras:
        raise FileError(f"{where} has no camera {key}; it has {', '.join(cameras)}")
    if not key and len(cameras) > 1:
        raise FileError(f"{where} has several cameras: {', '.join(cameras)}; choose one as in PATH@{cameras[0]}")
    return key or cameras[0]


def bounded(actions: np.ndarray, low: Sequence[float] = (), high: Sequence[float] = ()) -> ActionSpace:
    """[n, A] -> the space with these bounds; axes without finite ones get the smallest and largest value recorded."""
    bounds = []
    for given, recorded in ((low, actions.min(axis=0)), (high, actions.max(axis=0))):
        values = np.array(given, dtype=float) if len(given) else np.full(actions.shape[1], np.inf)
        bounds.append(tuple(np.where(np.isfinite(values), values, recorded).tolist()))
    return ActionSpace(low=bounds[0], high=bounds[1])


def check_actions_are_finite(actions: np.ndarray, where: str) -> None:
    """[T, A] of one episode. Raises FileError that names the first step with a missing value."""
    if not (is_finite := np.isfinite(actions).all(axis=1)).all():
        step = int(np.argmin(is_finite))
        raise FileError(f"{where}: the action of step {step} is {actions[step].tolist()}; every step needs numbers")


def slashed(names: Iterable[str], group: str) -> tuple[str, ...]:
    """Names of states as PROBE/COLUMN; those without a group get one."""
    return tuple(name if "/" in name else f"{group}/{name}" for name in names)


def existing_folder(path: Path, what: str) -> Path:
    if not path.is_dir():
        raise FileError(f"{path} is no folder; expected {what}")
    return path
