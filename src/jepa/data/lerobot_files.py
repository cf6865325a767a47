"""A LeRobot dataset of version 3, written from a store; the layout is told in `jepa.data.lerobot`."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from jepa.data.episode_store import Episode, EpisodeStore, StoreFacts

DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
EPISODES_PATH = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
CHUNK_SIZE = 1000
"""Largest number of files in a folder."""
CAMERA, TASK = "observation.image", "episodes"
FPS = 10
"""Frames of a second of video: a store knows no times."""
ENCODING = {"crf": "18", "g": "2"}
"""Of libx264: hardly visible losses; every second frame is a key frame, as LeRobot does for random access."""
NUM_PICTURES = 32
"""Frames whose pixels give the statistics of the camera."""


def write(store: EpisodeStore, folder: Path) -> None:
    """A data file and a video for each group of the store."""
    episodes: list[dict[str, Any]] = []
    columns: list[dict[str, np.ndarray]] = []
    for file, first in enumerate(store.firsts[:-1].tolist()):
        chunk_index, file_index = divmod(file, CHUNK_SIZE)
        numbers = range(first, int(store.firsts[file + 1]))
        place = {"chunk_index": chunk_index, "file_index": file_index}
        begin = episodes[-1]["dataset_to_index"] if episodes else 0
        group = [store.episode(number) for number in numbers]
        rows = _rows(group, numbers, begin)
        _save_table(folder / DATA_PATH.format(**place), rows, store.facts)
        _save_video(folder / VIDEO_PATH.format(video_key=CAMERA, **place), group)
        ends = begin + np.cumsum([len(episode.frames) for episode in group])
        episodes += [
            _episode(number, int(end) - len(episode.frames), int(end), begin, place)
            for number, episode, end in zip(numbers, group, ends, strict=True)
        ]
        columns.append(rows)
    _save_parquet(folder / EPISODES_PATH.format(chunk_index=0, file_index=0), _columns(episodes))
    _save_tasks(folder / "meta" / "tasks.parquet")
    _save_json(folder / "meta" / "stats.json", _statistics(store, columns))
    _save_json(folder / "meta" / "info.json", _info(store))


def _rows(group: list[Episode], numbers: range, begin: int) -> dict[str, np.ndarray]:
    """A row for each frame; the last one of an episode repeats the action before it and has no reward."""
    lengths = [len(episode.frames) for episode in group]
    frames = np.concatenate([np.arange(length) for length in lengths])
    columns: dict[str, list[np.ndarray]] = {
        name: [] for name in ("action", "next.reward", "next.done", "next.truncated")
    }
    for episode in group:
        columns["action"].append(np.concatenate([episode.actions, episode.actions[-1:]]))
        columns["next.reward"].append(np.append(episode.rewards, np.float32(0)))
        columns["next.done"].append(np.append(episode.terminated | episode.truncated, True))
        columns["next.truncated"].append(np.append(episode.truncated, False))
    return {
        "observation.state": np.concatenate([episode.states for episode in group]),
        **{name: np.concatenate(parts) for name, parts in columns.items()},
        "timestamp": (frames / FPS).astype(np.float32), "frame_index": frames,
        "episode_index": np.repeat(np.array(numbers), lengths), "index": begin + np.arange(len(frames)),
        "task_index": np.zeros(len(frames), dtype=np.int64),
    }  # fmt: skip


def _episode(number: int, first: int, end: int, begin: int, place: dict[str, int]) -> dict[str, Any]:
    """Rows `first` to `end` of all, in files whose first row is `begin`."""
    return {
        "episode_index": number, "tasks": [TASK], "length": end - first,
        **{f"data/{name}": value for name, value in place.items()},
        "dataset_from_index": first, "dataset_to_index": end,
        **{f"videos/{CAMERA}/{name}": value for name, value in place.items()},
        f"videos/{CAMERA}/from_timestamp": (first - begin) / FPS, f"videos/{CAMERA}/to_timestamp": (end - begin) / FPS,
        "meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0,
    }  # fmt: skip


def _columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def _features(facts: StoreFacts) -> dict[str, Any]:
    """Of all columns; a width of one is a plain number. `info` of the actions keeps what LeRobot has no place for."""
    channels, height, width = facts.frame_shape
    video = {
        "video.height": height, "video.width": width, "video.codec": "h264",
        "video.pix_fmt": _pixel_format(height, width), "video.is_depth_map": False, "video.fps": FPS,
        "video.channels": 3, "has_audio": False, "source_channels": channels,
    }  # fmt: skip
    picture = {"dtype": "video", "shape": [height, width, 3], "names": ["height", "width", "channels"], "info": video}
    space = facts.actions
    limits = {"num_actions": space.num_actions} if space.is_discrete else {"low": space.low, "high": space.high}
    number = {"shape": [1], "names": None}
    state = {"dtype": "float32", "shape": [len(facts.state_names)], "names": list(facts.state_names)}
    return {
        **({"observation.state": state} if facts.state_names else {}),
        CAMERA: picture,
        "action": {
            "dtype": "int64" if space.is_discrete else "float32", "shape": [len(space.low) or 1], "names": None,
            "info": limits,
        },
        "next.reward": {"dtype": "float32", **number},
        "next.done": {"dtype": "bool", **number},
        "next.truncated": {"dtype": "bool", **number},
        "timestamp": {"dtype": "float32", **number},
        **{name: {"dtype": "int64", **number} for name in ("frame_index", "episode_index", "index", "task_index")},
    }  # fmt: skip


def _info(store: EpisodeStore) -> dict[str, Any]:
    return {
        "codebase_version": "v3.0", "robot_type": None, "total_episodes": len(store),
        "total_frames": int(store.lengths.sum()) + len(store), "total_tasks": 1, "chunks_size": CHUNK_SIZE,
        "data_files_size_in_mb": 100, "video_files_size_in_mb": 200, "fps": FPS,
        "splits": {"train": f"0:{len(store)}"}, "data_path": DATA_PATH, "video_path": VIDEO_PATH,
        "features": _features(store.facts),
    }  # fmt: skip


def _statistics(store: EpisodeStore, columns: list[dict[str, np.ndarray]]) -> dict[str, Any]:
    """By feature; of the camera [3, 1, 1], from pixels in [0, 1] of some frames."""
    values = {name: np.concatenate([rows[name] for rows in columns]) for name in columns[0]}
    flat = {name: value.reshape(len(value), -1).astype(float) for name, value in values.items() if value.size}
    picks = np.linspace(0, len(store) - 1, NUM_PICTURES).astype(int).tolist()
    pictures = [store.read(n, k % int(store.lengths[n] + 1), 1, ("frames",))["frames"] for k, n in enumerate(picks)]
    pixels = np.concatenate(pictures) / 255.0
    pixels = np.broadcast_to(pixels, (len(pixels), 3, *pixels.shape[2:]))
    flat[CAMERA] = pixels.transpose(0, 2, 3, 1).reshape(-1, 3)
    shape = {name: (3, 1, 1) if name == CAMERA else (-1,) for name in flat}
    moments = {"min": np.min, "max": np.max, "mean": np.mean, "std": np.std}
    return {
        name: {kind: moment(value, axis=0).reshape(shape[name]).tolist() for kind, moment in moments.items()}
        | {"count": [len(pictures) if name == CAMERA else len(value)]}
        for name, value in flat.items()
    }


def _save_table(path: Path, rows: dict[str, np.ndarray], facts: StoreFacts) -> None:
    import pyarrow as pa

    columns = {}
    for name, feature in _features(facts).items():
        if feature["dtype"] != "video":
            width, kind = feature["shape"][0], pa.type_for_alias(feature["dtype"])
            flat = pa.array(rows[name].reshape(-1), kind)
            columns[name] = flat if width == 1 else pa.FixedSizeListArray.from_arrays(flat, width)
    _save_parquet(path, columns)


def _save_parquet(path: Path, columns: Any, metadata: dict[str, str] | None = None) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(columns).replace_schema_metadata(metadata), path)


def _save_tasks(path: Path) -> None:
    """A table of pandas with the texts as its index, which is how LeRobot looks them up."""
    column = {"pandas_type": "unicode", "numpy_type": "object", "metadata": None}
    number = {"pandas_type": "int64", "numpy_type": "int64", "metadata": None}
    columns = [
        {"name": "task_index", "field_name": "task_index", **number},
        {"name": "task", "field_name": "task", **column},
    ]
    pandas = {"index_columns": ["task"], "column_indexes": [], "columns": columns, "pandas_version": "2.0.0"}
    _save_parquet(path, {"task_index": [0], "task": [TASK]}, {"pandas": json.dumps(pandas)})


def _save_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=4), encoding="utf-8")


def _pixel_format(height: int, width: int) -> str:
    """Half the resolution of colours, which all players read, needs even sides."""
    return "yuv420p" if height % 2 == width % 2 == 0 else "yuv444p"


def _save_video(path: Path, group: list[Episode]) -> None:
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    _, height, width = group[0].frames.shape[1:]
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=Fraction(FPS), options=ENCODING)
        stream.width, stream.height = width, height
        stream.pix_fmt = _pixel_format(height, width)
        for picture in (picture for episode in group for picture in episode.frames):
            colours = np.broadcast_to(picture, (3, height, width)).transpose(1, 2, 0)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(colours), format="rgb24")))
        container.mux(stream.encode())
