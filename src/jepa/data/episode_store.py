"""Episodes on disk: frames, actions, rewards and ends, appended in groups and read through memory maps.

An episode is T + 1 frames and T transitions; transition k is action k, which leads from frame k to frame k + 1, its
reward and its ends. The first frame after a reset and the last frame are kept. A folder holds store.json and a folder
for each group of episodes with one array a file: lengths [n] (transitions of each episode), frames [sum(T + 1), C, H,
W], states [sum(T + 1), S], actions [sum(T), A] or [sum(T)], rewards, terminated and truncated [sum(T)]. A group is
written under another name and renamed when it is complete, so that a store can be read while it grows and a process
that is killed loses its last group only.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jepa.config.files import as_mapping, read_json
from jepa.errors import FileError
from jepa.types import ActionSpace

SCHEMA = 1
GROUP = re.compile(r"group-(\d{6})")
OTHER_FILES = 1024
"""Number of files that may be open beside those of a store."""
TRANSITIONS = ("actions", "rewards", "terminated", "truncated")
"""Arrays with a row for each transition."""
FRAMES = ("frames", "states")
"""Arrays with a row for each frame."""


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
        names = ("env", "policy", "seed", "steps", "frame_skip")
        shape, states = tuple(values["frame_shape"]), tuple(values["state_names"])
        return cls(frame_shape=shape, actions=actions, state_names=states, **{name: values[name] for name in names})

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1)
        temporary = folder / f".store.json.{os.getpid()}"
        temporary.write_text(text, encoding="utf-8")
        temporary.rename(folder / "store.json")


STORE_FIELDS = {
    "schema": int, "frame_shape": tuple[int, int, int], "actions": dict, "state_names": Sequence[str], "env": dict,
    "policy": dict, "seed": int, "steps": int, "frame_skip": int,
}  # fmt: skip
SPACE_FIELDS = {"low": Sequence[float], "high": Sequence[float], "num_actions": int}


class EpisodeStore:
    """The episodes of a folder, in the order of their collection; `groups` limits them to the first ones."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts = StoreFacts.read(folder)
        self.groups = [Group(path, self.facts) for path in group_folders(folder)]
        allow_open_files(len(Episode._fields) * len(self.groups))
        self.lengths = np.concatenate([np.zeros(0, dtype=np.int64), *(group.lengths for group in self.groups)])
        self.firsts = np.cumsum([0, *(len(group.lengths) for group in self.groups)])

    def __len__(self) -> int:
        return len(self.lengths)

    def read(
        self, number: int, first: int = 0, num_frames: int | None = None, names: Iterable[str] = Episode._fields
    ) -> dict[str, np.ndarray]:
        """Some arrays of a window of `num_frames` frames of one episode, and the transitions between them."""
        group = int(np.searchsorted(self.firsts, number, side="right")) - 1
        return self.groups[group].read(number - int(self.firsts[group]), first, num_frames, names)

    def episode(self, number: int) -> Episode:
        return Episode(**self.read(number))


class Group:
    """Some episodes in one folder, whose arrays are mapped when they are first read."""

    def __init__(self, folder: Path, facts: StoreFacts) -> None:
        self.folder, self.facts = folder, facts
        self.lengths = load(folder / "lengths.npy", (None,), np.int64)
        if len(self.lengths) and self.lengths.min() < 1:
            raise FileError(f"{folder / 'lengths.npy'}: an episode without a transition; remove this group")

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
            "rewards": ((total,), np.float32),
            "terminated": ((total,), np.bool_),
            "truncated": ((total,), np.bool_),
        }
        return {name: load(self.folder / f"{name}.npy", *kind) for name, kind in kinds.items()}

    def read(self, number: int, first: int, num_frames: int | None, names: Iterable[str]) -> dict[str, np.ndarray]:
        begin = int(self.first_transitions[number]) + first
        length = int(self.lengths[number]) - first if num_frames is None else num_frames - 1
        rows = {name: slice(begin, begin + length) for name in TRANSITIONS}
        rows |= {name: slice(begin + number, begin + number + length + 1) for name in FRAMES}
        return {name: self.arrays[name][rows[name]] for name in names}


def allow_open_files(count: int) -> None:
    """Let this process open that many files more than usual, as far as the system allows: a mapped file stays open."""
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OTHER_FILES + count if most == resource.RLIM_INFINITY else min(OTHER_FILES + count, most)
    if resource.RLIM_INFINITY != limit < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def load(path: Path, shape: tuple[int | None, ...], dtype: Any) -> np.ndarray:
    """A memory-mapped array of this shape and type (None: any length). Raises FileError for another or a damaged file."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        if path.is_file() and 0 in shape:
            return np.load(path, allow_pickle=False)
        raise FileError(
            f"{path} cannot be read ({' '.join(str(error).split())[:160]}); remove {path.parent}"
        ) from error
    is_expected = array.dtype == dtype and len(array.shape) == len(shape)
    if not is_expected or any(want is not None and want != have for want, have in zip(shape, array.shape, strict=True)):
        raise FileError(
            f"{path} holds {array.dtype} {array.shape}, expected {np.dtype(dtype)} {shape}; remove {path.parent}"
        )
    return array


def group_folders(folder: Path) -> list[Path]:
    """Complete groups, in order."""
    return sorted(path for path in folder.iterdir() if GROUP.fullmatch(path.name))


def append(folder: Path, episodes: Sequence[Episode]) -> None:
    """Write the episodes as one more group; store.json is there already."""
    groups = group_folders(folder)
    number = int(groups[-1].name.removeprefix("group-")) + 1 if groups else 0
    temporary = folder / f".group-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    np.save(temporary / "lengths.npy", np.array([len(episode.actions) for episode in episodes], dtype=np.int64))
    for name in Episode._fields:
        np.save(temporary / f"{name}.npy", np.concatenate([getattr(episode, name) for episode in episodes]))
    temporary.rename(folder / f"group-{number:06d}")


def iterate(store: EpisodeStore, names: Iterable[str]) -> Iterator[dict[str, np.ndarray]]:
    """Some arrays of one whole episode after the other."""
    return (store.read(number, names=names) for number in range(len(store)))
