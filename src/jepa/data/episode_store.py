"""Episodes on disk: frames, actions, rewards and ends, appended in groups and read through memory maps.

An episode is T + 1 frames and T transitions; transition k is action k, which leads from frame k to frame k + 1, its
reward and its ends. The first frame after a reset and the last frame are kept. A folder holds store.json and a folder
for each group of episodes with one array a file: lengths [n] (transitions of each episode), frames [sum(T + 1), C, H,
W], states [sum(T + 1), S], actions [sum(T), A] or [sum(T)], rewards, terminated and truncated [sum(T)]. A group is
written under another name and renamed when it is complete, so that a store can be read while it grows and a process
that is killed loses its last group only. Whoever writes holds the lock of the folder.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from tokenize import TokenError
from typing import IO, Any, NamedTuple

import numpy as np

from jepa.config.catalogue import flatten
from jepa.config.files import as_mapping, read_json
from jepa.config.schema import show_value
from jepa.errors import FileError, RunError
from jepa.types import ActionSpace, NonNegativeInt, PositiveInt

log = logging.getLogger(__name__)
SCHEMA = 1
GROUP = re.compile(r"group-\d{6}")
TRANSITIONS = ("actions", "rewards", "terminated", "truncated")
"""Arrays with a row for each transition."""
FRAMES = ("frames", "states")
"""Arrays with a row for each frame."""
MAX_MAPPED = 64
"""Groups whose arrays are mapped at the same time: each array holds a file open."""
LOAD_ERRORS = (OSError, ValueError, EOFError, SyntaxError, TypeError, OverflowError, MemoryError, TokenError)
"""Exceptions of NumPy for damaged files."""


class Episode(NamedTuple):
    """T + 1 frames and T transitions."""

    frames: np.ndarray
    """uint8 [T + 1, C, H, W]"""
    states: np.ndarray
    """float32 [T + 1, S]; S may be 0"""
    actions: np.ndarray
    """float32 [T, A], or int64 [T] if they are discrete"""
    rewards: np.ndarray
    """float32 [T]"""
    terminated: np.ndarray
    truncated: np.ndarray
    """bool [T]"""


@dataclass(frozen=True, kw_only=True)
class StoreFacts:
    """What all episodes of a store have in common; it is saved in store.json."""

    frame_shape: tuple[int, int, int]
    """(C, H, W)"""
    actions: ActionSpace
    state_names: tuple[str, ...] = ()
    env: Mapping[str, Any] = field(default_factory=dict)
    """Node of the environment; empty for recordings of other origin."""
    policy: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    steps: int = 0
    """Transitions of an episode that its world did not end; 0 if unknown."""
    frame_skip: int = 1
    """Steps of the simulator in a transition."""
    source: str = ""
    """Where recordings of other origin were read from."""

    @classmethod
    def read(cls, folder: Path) -> StoreFacts:
        """Raises FileError if store.json is missing or damaged."""
        path = folder / "store.json"
        values = read_json(path, STORE_FIELDS)
        if values["schema"] != SCHEMA:
            raise FileError(
                f"{path}: schema {values['schema']}, and schema {SCHEMA} is read; collect the episodes again"
            )
        space = as_mapping(values["actions"], f"{path}: actions", SPACE_FIELDS)
        actions = ActionSpace(tuple(space["low"]), tuple(space["high"]), space["num_actions"])
        if len(actions.low) != len(actions.high) or actions.is_discrete == bool(actions.low):
            raise FileError(f"{path}: actions have either bounds, as many low as high ones, or a number of actions")
        shape, names = tuple(values["frame_shape"]), tuple(values["state_names"])
        rest = {name: values[name] for name in ("env", "policy", "seed", "steps", "frame_skip", "source")}
        return cls(frame_shape=shape, actions=actions, state_names=names, **rest)

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1)
        temporary = folder / f".store.json.{os.getpid()}"
        temporary.write_text(text, encoding="utf-8")
        temporary.rename(folder / "store.json")


STORE_FIELDS = {
    "schema": int, "frame_shape": tuple[PositiveInt, PositiveInt, PositiveInt], "actions": dict,
    "state_names": Sequence[str], "env": dict, "policy": dict, "seed": NonNegativeInt, "steps": NonNegativeInt,
    "frame_skip": PositiveInt, "source": str,
}  # fmt: skip
SPACE_FIELDS = {"low": Sequence[float], "high": Sequence[float], "num_actions": NonNegativeInt}


class EpisodeStore:
    """The complete episodes that a folder holds now, in the order of their collection."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts = StoreFacts.read(folder)
        self.groups = [Group(path, self.facts) for path in group_folders(folder)]
        self.lengths = np.concatenate([np.zeros(0, dtype=np.int64), *(group.lengths for group in self.groups)])
        self.firsts = np.cumsum([0, *(len(group.lengths) for group in self.groups)])
        self.mapped: dict[int, None] = {}
        """Numbers of the groups whose arrays are mapped, the one used last at the end."""

    def __len__(self) -> int:
        return len(self.lengths)

    def read(
        self, number: int, first: int = 0, num_frames: int | None = None, names: Iterable[str] = Episode._fields
    ) -> dict[str, np.ndarray]:
        """Some arrays of a window of `num_frames` frames of one episode, and the transitions between them."""
        group = self.group_of(number)
        self.mapped.pop(group, None)
        self.mapped[group] = None
        if len(self.mapped) > MAX_MAPPED:
            oldest = next(iter(self.mapped))
            del self.mapped[oldest]
            self.groups[oldest].unmap()
        return self.groups[group].read(number - int(self.firsts[group]), first, num_frames, names)

    def group_of(self, number: int) -> int:
        """The group of an episode."""
        return int(np.searchsorted(self.firsts, number, side="right")) - 1

    def episode(self, number: int) -> Episode:
        return Episode(**self.read(number))


class Group:
    """Some episodes in one folder, whose arrays are mapped when they are read. Raises FileError for a damaged file."""

    def __init__(self, folder: Path, facts: StoreFacts) -> None:
        self.folder, self.facts = folder, facts
        self.lengths = np.array(load(folder / "lengths.npy", (None,), np.int64))
        if len(self.lengths) and self.lengths.min() < 1:
            path = folder / "lengths.npy"
            raise FileError(f"{path}: an episode has no transition; {_remedy(path)}")
        self.arrays  # noqa: B018  (a damaged file is refused here, not in the middle of a run)
        self.unmap()

    @cached_property
    def first_transitions(self) -> np.ndarray:
        return np.cumsum([0, *self.lengths])

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        total, count, facts = int(self.lengths.sum()), len(self.lengths), self.facts
        kinds: dict[str, tuple[tuple[int, ...], Any]] = {
            "frames": ((total + count, *facts.frame_shape), np.uint8),
            "states": ((total + count, len(facts.state_names)), np.float32),
            "actions": ((total, *facts.actions.shape), np.int64 if facts.actions.is_discrete else np.float32),
            "rewards": ((total,), np.float32), "terminated": ((total,), np.bool_), "truncated": ((total,), np.bool_),
        }  # fmt: skip
        return {name: load(self.folder / f"{name}.npy", *kind) for name, kind in kinds.items()}

    def unmap(self) -> None:
        self.__dict__.pop("arrays", None)

    def __getstate__(self) -> dict[str, Any]:
        """Without the maps, which would be pickled as copies of the files."""
        return {name: value for name, value in self.__dict__.items() if name != "arrays"}

    def read(self, number: int, first: int, num_frames: int | None, names: Iterable[str]) -> dict[str, np.ndarray]:
        begin = int(self.first_transitions[number]) + first
        length = int(self.lengths[number]) - first if num_frames is None else num_frames - 1
        rows = {name: slice(begin, begin + length) for name in TRANSITIONS}
        rows |= {name: slice(begin + number, begin + number + length + 1) for name in FRAMES}
        return {name: self.arrays[name][rows[name]] for name in names}


def load(path: Path, shape: tuple[int | None, ...], dtype: Any) -> np.ndarray:
    """A memory-mapped array of this shape (None: any length) and type. Raises FileError for another one."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except LOAD_ERRORS as error:
        is_readable = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
        reason = f"{path} cannot be read ({' '.join(str(error).split())[:160]})"
        raise FileError(reason if is_readable else f"{reason}; {_remedy(path)}") from error
    is_expected = array.dtype == dtype and len(array.shape) == len(shape)
    if not is_expected or any(want is not None and want != have for want, have in zip(shape, array.shape, strict=True)):
        raise FileError(
            f"{path} holds {array.dtype} {array.shape}, expected {np.dtype(dtype)} {shape}; {_remedy(path)}"
        )
    return array


def _remedy(path: Path) -> str:
    """Episodes are numbered through, so that those after a gap would be others."""
    return f"remove {path.parent.name} and the groups after it, and collect or import them again"


def group_folders(folder: Path) -> list[Path]:
    """Complete groups, in order. Raises FileError if one is missing."""
    groups = sorted(path for path in folder.iterdir() if GROUP.fullmatch(path.name))
    if missing := [number for number, path in enumerate(groups) if path.name != group_name(number)]:
        lacks = f"{folder} lacks {group_name(missing[0])}"
        raise FileError(f"{lacks}; remove the groups after it, and collect or import them again")
    return groups


def group_name(number: int) -> str:
    return f"group-{number:06d}"


@contextmanager
def writing(folder: Path, facts: StoreFacts) -> Iterator[None]:
    """Hold the lock of a folder for episodes with these facts; a new store gets them, what a killed writer left goes.

    Raises RunError if the folder holds episodes with other facts or something else, or cannot be written. On a file
    system without locks nobody waits.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("a") as file:
            _lock(file, folder)
            for rest in (*folder.glob(".group-*"), *folder.glob(".store.json.*")):
                shutil.rmtree(rest) if rest.is_dir() else rest.unlink()
            _check(folder, facts)
            yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENOTDIR, errno.EEXIST):
            raise
        raise RunError(
            f"{error.filename or folder} cannot be written ({error.strerror}): make room there or give another folder; "
            "the same command again goes on where it was"
        ) from error


def _lock(file: IO[str], folder: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        log.info("%s: another process writes there; this one waits until it has ended", folder)
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        log.warning("%s: the file system has no locks; let only one process write there", folder)


def _check(folder: Path, facts: StoreFacts) -> None:
    """Raises RunError unless the folder is empty or holds episodes that were collected as those to come."""
    others = sorted(path.name for path in folder.iterdir() if path.name not in (".lock", "store.json"))
    if others and not (folder / "store.json").exists():
        raise RunError(f"{folder} is no store of episodes, it holds {', '.join(others[:3])}; give another folder")
    if not others:
        facts.write(folder)
    old, new = (_flat(of) for of in (StoreFacts.read(folder), facts))
    changed = [key for key in (*old, *(new.keys() - old.keys())) if old.get(key) != new.get(key)]
    if changed:
        before, after = (
            ", ".join(f"{key}={show_value(values[key])}" for key in changed if key in values) for values in (old, new)
        )
        raise RunError(f"{folder} holds episodes of {before}, and {after} was asked for; give another folder")


def _flat(facts: StoreFacts) -> dict[str, Any]:
    """Dotted key -> value, as JSON has it."""
    return dict(flatten(json.loads(json.dumps(asdict(facts)))))


def append(folder: Path, episodes: Sequence[Episode]) -> None:
    """Write the episodes as one more group, inside of `writing`."""
    number = len(group_folders(folder))
    temporary = folder / f".group-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    np.save(temporary / "lengths.npy", np.array([len(episode.actions) for episode in episodes], dtype=np.int64))
    for name in Episode._fields:
        np.save(temporary / f"{name}.npy", np.concatenate([getattr(episode, name) for episode in episodes]))
    temporary.rename(folder / group_name(number))


def iterate(store: EpisodeStore, names: Iterable[str]) -> Iterator[dict[str, np.ndarray]]:
    """Some arrays of one whole episode after the other."""
    return (store.read(number, names=names) for number in range(len(store)))
