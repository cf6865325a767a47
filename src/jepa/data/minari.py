"""Minari datasets of HDF5 files, read and written without Minari.

Layout: docs/content/dataset_standards.md and minari/dataset/_storages/hdf5_storage.py of Minari 0.5.4. NAME/data holds
metadata.json, whose action_space and observation_space are JSON texts, and main_data.hdf5 with a group episode_N for
each episode: observations [T + 1] (an array, or groups of arrays), actions, rewards, terminations and truncations [T].
Observations have one row more than actions, which is the rule of our episodes. Images are arrays or, with
jpeg_encoding, JPEG files. Infos are not read; numbers among the observations become the states.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jepa.config.files import as_mapping, parse_json, read_json
from jepa.data.decode import decode
from jepa.data.episode_store import Episode, EpisodeStore, StoreFacts
from jepa.data.recordings import ONE_FRAME, Recording, bounded, check_actions_are_finite, choose_camera, require
from jepa.errors import FileError
from jepa.types import ActionSpace, PositiveInt

MIN_SIDE = 32
"""Pixels of the shorter side from which on Minari itself calls an array an image."""
JPEG = b"\xff\xd8\xff"
ERRORS = (OSError, KeyError, RuntimeError, ValueError, TypeError)
"""Exceptions of h5py for damaged files."""
METADATA = {"data_format": str | None, "action_space": str, "state_names": list | None}
TRANSITIONS = ("rewards", "terminations", "truncations")


class EpisodeSteps(NamedTuple):
    """Of one episode, without its observations."""

    name: str
    actions: np.ndarray
    """[T, A], or whole numbers [T]"""
    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray


def read(path: Path, key: str) -> Recording:
    """The dataset NAME, NAME/data or NAME/data/main_data.hdf5. Raises FileError."""
    require("minari", "h5py")
    folder = path / "data" if (path / "data").is_dir() else path
    file = path if path.is_file() else folder / "main_data.hdf5"
    metadata = read_json(file.parent / "metadata.json", METADATA)
    if (kind := metadata.get("data_format") or "hdf5") != "hdf5":
        raise FileError(f"{path}: data_format {kind}, only hdf5 is read; write the dataset again with it")
    if not file.is_file():
        raise FileError(f"{path} holds no main_data.hdf5")
    space, start = _space(metadata["action_space"], f"{file.parent / 'metadata.json'}: action_space")
    with _opened(file) as data:
        names = sorted((name for name in data if re.fullmatch(r"episode_\d+", name)), key=lambda name: int(name[8:]))
        if not names:
            raise FileError(f"{file} holds no group episode_0")
        every = [_steps(data[name], f"{file}: {name}", start if space.is_discrete else None) for name in names]
        episodes = [steps for steps in every if len(steps.actions)]
        leaves = _leaves(data[names[0]]["observations"])
        camera = _camera(leaves, key, path)
        first = _frames(leaves[camera], f"{file}: {names[0]}/{camera}")
        columns = [name for name, leaf in leaves.items() if leaf.ndim <= 2 and leaf.dtype.kind in "fiub"]
        columns = [name for name in columns if not _is_image(leaves[name])]
        widths = {name: int(np.prod(leaves[name].shape[1:])) for name in columns}
    own_names = tuple(map(str, metadata.get("state_names") or ()))
    numbered = tuple(f"{name}/{number}" for name, width in widths.items() for number in range(width))
    if episodes:
        space = _checked(space, np.concatenate([steps.actions for steps in episodes]), str(file))
    facts = StoreFacts(
        frame_shape=first.shape[1:], actions=space, source=f"minari:{path}@{camera}",
        state_names=own_names if len(own_names) == len(numbered) else numbered,
    )  # fmt: skip

    def episode(number: int) -> Episode:
        steps = episodes[number]
        with _opened(file) as data:
            leaves, where = _leaves(data[steps.name]["observations"]), f"{file}: {steps.name}"
            frames = _frames(leaves[camera], f"{where}/{camera}")
            states = [np.asarray(leaves[name], dtype=np.float32).reshape(len(frames), -1) for name in columns]
        states = np.concatenate([np.zeros((len(frames), 0), dtype=np.float32), *states], axis=1)
        if states.shape[1] != len(facts.state_names):
            raise FileError(f"{where} has {states.shape[1]} numbers in an observation, expected {len(numbered)}")
        return Episode(frames, states, *steps[1:])

    left_out = Counter({ONE_FRAME: len(every) - len(episodes)})
    return Recording(facts, [len(steps.actions) for steps in episodes], episode, left_out)


def _steps(group: Any, where: str, start: int | None) -> EpisodeSteps:
    """Actions and results; discrete actions are counted from `start`."""
    if lacking := [name for name in ("observations", "actions", *TRANSITIONS) if name not in group]:
        raise FileError(f"{where} has no {', '.join(lacking)}")
    if not hasattr(group["actions"], "shape"):
        raise FileError(f"{where}: its actions are a dictionary or tuple; arrays are read")
    actions = np.asarray(group["actions"])
    length, sizes = len(actions), {name: len(group[name]) for name in TRANSITIONS}
    sizes |= {name: len(leaf) - 1 for name, leaf in _leaves(group["observations"]).items()}
    if wrong := [f"{size} {name}" for name, size in sizes.items() if size != length]:
        raise FileError(f"{where} has {length} actions and {wrong[0]} (of observations, without the first)")
    if start is None:
        actions = actions.reshape(length, int(np.prod(actions.shape[1:]))).astype(np.float32)
        check_actions_are_finite(actions, where)
    else:
        actions = actions.reshape(length).astype(np.int64) - start
    rewards, terminated, truncated = (np.asarray(group[name]) for name in TRANSITIONS)
    name = group.name.strip("/")
    return EpisodeSteps(name, actions, rewards.astype(np.float32), terminated.astype(bool), truncated.astype(bool))


def _space(text: str, where: str) -> tuple[ActionSpace, int]:
    """The space of actions and the smallest discrete action."""
    space = as_mapping(parse_json(text, where), where, {"type": str})
    if space["type"] == "Discrete":
        values = as_mapping(space, where, {"n": PositiveInt, "start": int})
        return ActionSpace(num_actions=values["n"]), values["start"]
    if space["type"] == "Box":
        values = as_mapping(space, where, {"low": list, "high": list})
        try:
            low, high = (tuple(np.ravel(np.array(values[name], dtype=float)).tolist()) for name in ("low", "high"))
        except (ValueError, TypeError, OverflowError) as error:
            raise FileError(f"{where}: its bounds are no numbers") from error
        return ActionSpace(low=low, high=high), 0
    raise FileError(f"{where}: {space['type']}; Box and Discrete are read")


def _checked(space: ActionSpace, actions: np.ndarray, where: str) -> ActionSpace:
    """The space with finite bounds. Raises FileError if actions of all episodes do not fit it."""
    if space.is_discrete:
        if actions.min() < 0 or actions.max() >= space.num_actions:
            raise FileError(f"{where} has actions that are none of the {space.num_actions} of action_space")
        return space
    if not len(space.low) == len(space.high) == actions.shape[1]:
        raise FileError(f"{where} has actions of {actions.shape[1]} numbers, and action_space has {len(space.low)}")
    return bounded(actions, space.low, space.high)


def _leaves(node: Any) -> dict[str, Any]:
    """The arrays of the observations by name."""
    if hasattr(node, "shape"):
        return {"observations": node}
    leaves: dict[str, Any] = {}
    node.visititems(lambda name, item: leaves.update({name: item}) if hasattr(item, "shape") else None)
    return leaves


def _camera(leaves: Mapping[str, Any], key: str, path: Path) -> str:
    """Small arrays, such as the symbols of MiniGrid, are taken for pictures only if they are named."""
    images = [name for name, leaf in leaves.items() if _is_image(leaf)]
    large = [n for n in images if key or _holds_files(leaves[n]) or sorted(leaves[n].shape[1:])[-2] >= MIN_SIDE]
    if images and not large:
        small = f"the array {images[0]} {leaves[images[0]].shape[1:]}, which may be no picture"
        raise FileError(f"{path} has {small}: it has fewer than {MIN_SIDE} pixels a side; PATH@{images[0]} takes it")
    return choose_camera(large, key, str(path))


def _is_image(leaf: Any) -> bool:
    """True for uint8 arrays [n, H, W, C], [n, C, H, W] or [n, H, W], and for JPEG files."""
    if _holds_files(leaf):
        return True
    is_coloured = leaf.ndim == 4 and not {leaf.shape[1], leaf.shape[3]}.isdisjoint({1, 3})
    return bool(leaf.dtype == np.uint8 and (leaf.ndim == 3 or is_coloured))


def _holds_files(leaf: Any) -> bool:
    """JPEG files of one length are a matrix, others rows of their own."""
    has_rows = (leaf.dtype.metadata or {}).get("vlen") == np.uint8 or (leaf.dtype == np.uint8 and leaf.ndim == 2)
    return bool(has_rows and len(leaf) and bytes(np.asarray(leaf[0], dtype=np.uint8)[:3]) == JPEG)


def _frames(leaf: Any, where: str) -> np.ndarray:
    """uint8 [n, C, H, W]"""
    if not _holds_files(leaf):
        frames = np.asarray(leaf)
        frames = frames[..., None] if frames.ndim == 3 else frames
        return np.ascontiguousarray(frames.transpose(0, 3, 1, 2)) if frames.shape[3] in (1, 3) else frames
    frames = [decode(bytes(np.asarray(row, dtype=np.uint8)), channels=3).numpy()[:, 0] for row in leaf]
    if differing := next((n for n, frame in enumerate(frames) if frame.shape != frames[0].shape), 0):
        sizes = f"{frames[differing].shape[1:]}, the first {frames[0].shape[1:]}"
        raise FileError(f"{where}: frame {differing} has the size {sizes}")
    return np.stack(frames)


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    import h5py

    try:
        with h5py.File(file) as data:
            yield data
    except FileError:
        raise
    except ERRORS as error:
        raise FileError(f"{file} cannot be read ({' '.join(str(error).split())[:200]})") from error


def write(store: EpisodeStore, folder: Path) -> None:
    """The dataset in `folder`/data, with observations {image, state}; frames are not compressed, so they are exact."""
    require("minari", "h5py")
    import h5py

    (folder / "data").mkdir()
    with h5py.File(folder / "data" / "main_data.hdf5", "w", track_order=True) as data:
        for number in range(len(store)):
            episode, group = store.episode(number), data.create_group(f"episode_{number}")
            group.attrs.update({"id": number, "total_steps": len(episode.actions)})
            observations = group.create_group("observations")
            observations["image"] = episode.frames.transpose(0, 2, 3, 1)
            if store.facts.state_names:
                observations["state"] = episode.states
            for name, values in zip(("actions", *TRANSITIONS), episode[2:], strict=True):
                group[name] = values
    text = json.dumps(_metadata(store, folder))
    (folder / "data" / "metadata.json").write_text(text, encoding="utf-8")


def _metadata(store: EpisodeStore, folder: Path) -> dict[str, Any]:
    facts = store.facts
    channels, height, width = facts.frame_shape
    spaces = {"image": _box(np.zeros((height, width, channels)), np.full((height, width, channels), 255), "uint8")}
    if count := len(facts.state_names):
        spaces["state"] = _box(np.full(count, -np.inf), np.full(count, np.inf), "float32")
    actions = _box(np.array(facts.actions.low), np.array(facts.actions.high), "float32")
    if facts.actions.is_discrete:
        actions = {"type": "Discrete", "dtype": "int64", "start": 0, "n": facts.actions.num_actions}
    name = re.sub(r"\W+", "-", folder.name).strip("-")
    return {
        "dataset_id": f"jepa/{name or 'episodes'}-v0", "total_episodes": len(store), "data_format": "hdf5",
        "total_steps": int(store.lengths.sum()), "jpeg_encoding": False, "minari_version": "0.5.3",
        "observation_space": json.dumps({"type": "Dict", "subspaces": spaces}), "action_space": json.dumps(actions),
        "state_names": list(facts.state_names),
    }  # fmt: skip


def _box(low: np.ndarray, high: np.ndarray, dtype: str) -> Mapping[str, Any]:
    bounds = {"low": low.astype(dtype).tolist(), "high": high.astype(dtype).tolist()}
    return {"type": "Box", "dtype": dtype, "shape": list(low.shape), **bounds}
