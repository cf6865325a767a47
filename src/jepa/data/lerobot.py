"""LeRobot datasets of version 3, read and written without LeRobot.

Layout: src/lerobot/datasets of huggingface/lerobot, CODEBASE_VERSION v3.0. meta/info.json has fps and the features;
meta/episodes/*/*.parquet has a row for each episode: length, and for each camera KEY the number of its file and the
time in it; data/*/*.parquet a row for each frame; videos/KEY/chunk-000/file-000.mp4 the frames of several episodes.

LeRobot has as many actions as frames: row k holds frame k, action k and, as next.reward and next.done, its results.
The outcome of the last action was not recorded, so the last row gives only its frame to an episode. Written in turn,
the last row repeats the action before it, with reward 0. next.truncated is ours and tells truncation from termination.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from jepa.config.files import as_mapping, read_json
from jepa.data import lerobot_files
from jepa.data.decode import decode
from jepa.data.episode_store import Episode, EpisodeStore, StoreFacts
from jepa.data.lerobot_files import DATA_PATH, VIDEO_PATH
from jepa.data.parquet import read_arrow
from jepa.data.recordings import (
    ONE_FRAME,
    Recording,
    bounded,
    check_actions_are_finite,
    choose_camera,
    existing_folder,
    require,
    slashed,
)
from jepa.errors import FileError
from jepa.types import ActionSpace, Positive

INFO = {"codebase_version": str, "fps": Positive, "features": dict}
FEATURE = {"dtype": str, "shape": Sequence[int]}
BOUNDS = {"low": Sequence[float] | None, "high": Sequence[float] | None}
ERRORS = (RuntimeError, ValueError, IndexError, OSError)
"""Exceptions of PyAV and of image decoders for damaged files."""


def read(path: Path, key: str) -> Recording:
    """Raises FileError."""
    require("lerobot", "pyarrow", "av")
    return Folder(existing_folder(path, "a LeRobot dataset with meta/info.json in it"), key).recording()


def write(store: EpisodeStore, folder: Path) -> None:
    require("lerobot", "pyarrow", "av")
    lerobot_files.write(store, folder)


class Folder:
    """A dataset whose rows are in memory and whose frames are decoded episode by episode."""

    def __init__(self, path: Path, key: str) -> None:
        self.path, where = path, path / "meta" / "info.json"
        info = read_json(where, INFO)
        if not info["codebase_version"].startswith("v3."):
            version = f"{where}: codebase_version {info['codebase_version']}, version 3 is read"
            raise FileError(f"{version}; LeRobot's convert_dataset_v21_to_v30 converts it")
        if info.get("video_path") not in (None, VIDEO_PATH):
            raise FileError(f"{where}: video_path {info['video_path']}; expected {VIDEO_PATH}")
        self.fps = float(info["fps"])
        self.features = {name: as_mapping(node, f"{where}: {name}", FEATURE) for name, node in info["features"].items()}
        if "action" not in self.features:
            raise FileError(f"{where} has no feature action, without which nothing leads from frame to frame")
        cameras = [name for name, node in self.features.items() if node["dtype"] in ("video", "image")]
        self.camera = choose_camera([name for name in cameras if not self._is_depth(name)], key, str(where))
        self.num_channels = 1 if self._extras(self.camera).get("source_channels") == 1 else 3
        self.table = self._rows()
        self.episodes = self._episodes()
        self.pictures: tuple[Path, Any] = (path, None)
        """The data file that was read last and its rows, if they hold the frames."""

    def _extras(self, name: str) -> dict[str, Any]:
        """The entry `info` of a feature."""
        extras = self.features[name].get("info")
        return extras if isinstance(extras, dict) else {}

    def _is_depth(self, name: str) -> bool:
        extras = self._extras(name)
        return bool(extras.get("is_depth_map") or extras.get("video.is_depth_map"))

    def recording(self) -> Recording:
        lengths = [int(length) for length in self.episodes["length"]]
        kept = [number for number, length in enumerate(lengths) if length > 1]
        state = self.features.get("observation.state")
        names = _names(state) if state else ()
        shape = self._frames(kept[0]).shape[1:] if kept else (3, 1, 1)
        source = f"lerobot:{self.path}@{self.camera}"
        facts = StoreFacts(frame_shape=shape, actions=self._space(), state_names=names, source=source)
        left_out = Counter({ONE_FRAME: len(lengths) - len(kept)})
        return Recording(facts, [lengths[n] - 1 for n in kept], lambda number: self._episode(kept[number]), left_out)

    def _rows(self) -> dict[str, np.ndarray]:
        """The numbers of all frames [n, width], in order of episodes and frames."""
        optional = ("observation.state", "next.reward", "next.done", "next.truncated")
        columns = ["episode_index", "frame_index", "action", *(name for name in optional if name in self.features)]
        tables = [_table(path, columns) for path in _parquet_files(self.path / "data")]
        rows = {
            name: np.concatenate([_numbers(table, name, self.path / "data") for table in tables]) for name in columns
        }
        order = np.lexsort((rows["frame_index"][:, 0], rows["episode_index"][:, 0]))
        return {name: values[order] for name, values in rows.items()}

    def _episodes(self) -> dict[str, np.ndarray]:
        """Columns of all episodes in order, with `begin`, the number of their first row."""
        kinds = ("chunk_index", "file_index", "from_timestamp")
        is_video = self.features[self.camera]["dtype"] == "video"
        names = (
            [f"videos/{self.camera}/{kind}" for kind in kinds] if is_video else [f"data/{kind}" for kind in kinds[:2]]
        )
        columns, folder = ["episode_index", "length", *names], self.path / "meta" / "episodes"
        tables = [_table(path, columns) for path in _parquet_files(folder)]
        short = [*columns[:2], *kinds[: len(names)]]
        episodes = {
            to: np.concatenate([_numbers(table, name, folder)[:, 0] for table in tables])
            for to, name in zip(short, columns, strict=True)
        }
        if not all(len(values) and np.isfinite(values).all() for values in episodes.values()):
            raise FileError(f"{folder} holds no episodes, or some without {', '.join(columns)}")
        order = np.argsort(episodes["episode_index"], kind="stable")
        episodes = {name: values[order] for name, values in episodes.items()}
        index, frame = self.table["episode_index"][:, 0], self.table["frame_index"][:, 0]
        numbers, lengths = episodes["episode_index"], episodes["length"]
        episodes["begin"], ends = (np.searchsorted(index, numbers, side) for side in ("left", "right"))
        for number, length, begin, end in zip(numbers, lengths, episodes["begin"], ends, strict=True):
            where = f"{self.path}: episode {int(number)}"
            if end - begin != length or not np.array_equal(frame[begin:end], np.arange(length)):
                both = f"{end - begin} rows in data, and meta says {int(length)}"
                raise FileError(f"{where} has {both}; their frame_index counts from 0 on")
            check_actions_are_finite(self.table["action"][begin:end], where)
        return episodes

    def _space(self) -> ActionSpace:
        """Whole numbers in one column are discrete actions; of others the bounds are ours or those recorded."""
        feature, actions, extras = self.features["action"], self.table["action"], self._extras("action")
        if not feature["dtype"].startswith(("int", "uint")) or actions.shape[1] > 1:
            lists = (as_mapping(extras, self.path, BOUNDS).get(name) for name in BOUNDS)
            return bounded(actions, *(values if values and len(values) == actions.shape[1] else () for values in lists))
        if actions.min() < 0:
            raise FileError(f"{self.path}: the discrete action {int(actions.min())} is negative")
        declared = as_mapping(extras, self.path, {"num_actions": int | None}).get("num_actions")
        return ActionSpace(num_actions=max(declared or 0, int(actions.max()) + 1))

    def _episode(self, number: int) -> Episode:
        begin, frames = int(self.episodes["begin"][number]), self._frames(number)
        row = {name: values[begin : begin + len(frames)] for name, values in self.table.items()}
        states = row.get("observation.state", np.zeros((len(frames), 0))).astype(np.float32)
        rewards, done, cut = (
            row.get(name, np.zeros((len(frames), 1)))[:-1, 0] for name in ("next.reward", "next.done", "next.truncated")
        )
        actions = row["action"][:-1]
        actions = actions[:, 0].astype(np.int64) if self._space().is_discrete else actions.astype(np.float32)
        truncated = cut.astype(bool)
        return Episode(frames, states, actions, rewards.astype(np.float32), done.astype(bool) & ~truncated, truncated)

    def _frames(self, number: int) -> np.ndarray:
        """uint8 [T + 1, C, H, W]"""
        chunk, file, length = (int(self.episodes[name][number]) for name in ("chunk_index", "file_index", "length"))
        is_video = self.features[self.camera]["dtype"] == "video"
        template = VIDEO_PATH if is_video else DATA_PATH
        path = self.path / template.format(video_key=self.camera, chunk_index=chunk, file_index=file)
        try:
            if is_video:
                begin = float(self.episodes["from_timestamp"][number])
                return decode_video(path, begin, length, self.fps)[:, : self.num_channels]
            if self.pictures[0] != path:
                self.pictures = path, _table(path, ["episode_index", "frame_index", self.camera])
            table = self.pictures[1]
            is_own = table["episode_index"].to_numpy() == self.episodes["episode_index"][number]
            rows = sorted(table.filter(is_own).to_pylist(), key=lambda row: row["frame_index"])
            return np.stack([decode(row[self.camera]["bytes"], channels=3).numpy()[:, 0] for row in rows])
        except (*ERRORS, TypeError) as error:
            if isinstance(error, FileError):
                raise
            reason = " ".join(str(error).split())[:200]
            raise FileError(f"{path}: the frames of episode {number} cannot be read ({reason})") from error


def decode_video(path: Path, begin: float, count: int, fps: float) -> np.ndarray:
    """uint8 [count, 3, H, W]: the frames shown at `begin` + k / fps seconds. Raises OSError if one is lacking."""
    import av

    frames: dict[int, np.ndarray] = {}
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        base = stream.time_base or Fraction(1, 90_000)
        container.seek(int(begin / base), stream=stream)
        for frame in container.decode(stream):
            position = round(((frame.pts or 0) * float(base) - begin) * fps)
            if position >= count:
                break
            if position >= 0:
                frames.setdefault(position, frame.to_ndarray(format="rgb24"))
    if missing := [position for position in range(count) if position not in frames]:
        raise OSError(f"{len(missing)} of {count} are lacking, the first at {begin + missing[0] / fps:.3f} s")
    return np.stack([frames[position] for position in range(count)]).transpose(0, 3, 1, 2)


def _parquet_files(folder: Path) -> list[Path]:
    if not (files := sorted(folder.glob("*/*.parquet"))):
        raise FileError(f"{folder} holds no chunk-000/file-000.parquet")
    return files


def _table(path: Path, columns: Sequence[str]) -> Any:
    try:
        return read_arrow(path, str(path), list(columns))
    except ValueError as error:
        raise FileError(str(error)) from error


def _numbers(table: Any, name: str, where: Path) -> np.ndarray:
    """A column of numbers, or of lists of as many numbers in each row, as [n, width]; missing ones are nan."""
    column, types = table[name].combine_chunks(), (np.bool_, np.integer, np.floating)
    has_gaps = False
    while hasattr(column.type, "value_type") or hasattr(column, "storage"):
        has_gaps |= column.null_count > 0  # a list that is missing would move the others
        column = column.storage if hasattr(column, "storage") else column.flatten()
    values = column.to_numpy(zero_copy_only=False)
    if values.dtype == object:  # booleans with missing ones
        values = np.array([np.nan if value is None else value for value in values])
    if has_gaps or not issubclass(values.dtype.type, types) or (len(table) and len(values) % len(table)):
        raise FileError(f"{where}: the column {name} is no matrix of numbers ({table[name].type})")
    return values.reshape(len(table), -1)


def _names(feature: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the numbers of a state: a list, or lists by group; else their numbers."""
    width = int(np.prod(feature["shape"]))
    names: Any = feature.get("names")
    lists: Iterable[Any] = names.values() if isinstance(names, dict) else [names]
    flat = [str(name) for part in lists if isinstance(part, list) for name in part]
    return slashed(flat if len(flat) == width else map(str, range(width)), "state")
