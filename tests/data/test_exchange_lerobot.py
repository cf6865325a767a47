"""LeRobot datasets of version 3 as LeRobot writes them: several episodes in a file, cameras, times, refusals."""

from __future__ import annotations

import io
import json
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile_files import changed
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from stored_episodes import DISCRETE, write_store

from jepa.data import lerobot
from jepa.data.episode_store import EpisodeStore
from jepa.data.exchange import read_source, write_export
from jepa.errors import FileError

av = pytest.importorskip("av")
pa = pytest.importorskip("pyarrow")
from pyarrow import parquet  # noqa: E402

FPS, SIDE = 30, 32
TOP, WRIST = "observation.images.top", "observation.images.wrist"
LENGTHS = (4, 3, 5)
FEATURES = {
    TOP: {"dtype": "video", "shape": [SIDE, SIDE, 3], "info": {"video.is_depth_map": False}},
    "observation.state": {"dtype": "float32", "shape": [2], "names": {"motors": ["pan", "lift"]}},
    "action": {"dtype": "float32", "shape": [2], "names": {"motors": ["pan", "lift"]}},
    "next.reward": {"dtype": "float32", "shape": [1], "names": None},
    "next.done": {"dtype": "bool", "shape": [1], "names": None},
}


def pictures(number: int, length: int) -> np.ndarray:
    """[T, H, W, 3]: frame t has 40 t in its upper half and 60 times the number of its episode below"""
    frames = np.full((length, SIDE, SIDE, 3), 60 * number, dtype=np.uint8)
    frames[:, : SIDE // 2] = 40 * np.arange(length)[:, None, None, None]
    return frames


def write_video(path: Path, frames: np.ndarray, codec: str = "mpeg4", rate: int = FPS) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(rate))
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.bit_rate = 4_000_000
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_lerobot(folder: Path, *, is_video: bool = True, lengths: tuple[int, ...] = LENGTHS, **info: Any) -> Path:
    """As LeRobotDataset.save_episode: the last episode begins a second file of data and of video."""
    camera, number = TOP if is_video else WRIST, len(lengths) - 1
    files = [list(range(number)), [number]]
    (folder / "meta").mkdir(parents=True)
    content = {"codebase_version": "v3.0", "robot_type": None, "fps": FPS, "features": FEATURES}
    if not is_video:
        features = {WRIST: {"dtype": "image", "shape": [SIDE, SIDE, 3]}}
        content["features"] = features | {name: FEATURES[name] for name in FEATURES if name != TOP}
    (folder / "meta" / "info.json").write_text(json.dumps(content | info))
    episodes, index = [], 0
    for file, numbers in enumerate(files):
        path = Path("chunk-000") / f"file-{file:03d}"
        rows, begin = [], 0
        for n in numbers:
            frames = pictures(n, lengths[n])
            for t in range(lengths[n]):
                row = {
                    "observation.state": [n, t], "action": [n, t + 0.5], "next.reward": float(t),
                    "next.done": t == lengths[n] - 1, "timestamp": t / FPS, "frame_index": t, "episode_index": n,
                    "index": index + t, "task_index": 0,
                }  # fmt: skip
                if not is_video:
                    Image.fromarray(frames[t]).save(buffer := io.BytesIO(), format="PNG")
                    row[camera] = {"bytes": buffer.getvalue(), "path": f"frame-{t:06d}.png"}
                rows.append(row)
            episodes.append({
                "episode_index": n, "tasks": ["go"], "length": lengths[n], "dataset_from_index": index,
                "data/chunk_index": 0, "data/file_index": file,
                "dataset_to_index": index + lengths[n],
                f"videos/{camera}/chunk_index": 0, f"videos/{camera}/file_index": file,
                f"videos/{camera}/from_timestamp": begin / FPS,
                f"videos/{camera}/to_timestamp": (begin + lengths[n]) / FPS,
            })  # fmt: skip
            begin, index = begin + lengths[n], index + lengths[n]
        vector = pa.list_(pa.float32(), 2)
        schema = pa.Table.from_pylist(rows).schema
        for name in ("observation.state", "action"):
            schema = schema.set(schema.get_field_index(name), pa.field(name, vector))
        (folder / "data" / path).parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pa.Table.from_pylist(rows, schema), f"{folder / 'data' / path}.parquet")
        if is_video:
            video = np.concatenate([pictures(n, lengths[n]) for n in numbers])
            write_video(folder / "videos" / camera / f"{path}.mp4", video)
    meta = folder / "meta" / "episodes" / "chunk-000"
    meta.mkdir(parents=True)
    parquet.write_table(pa.Table.from_pylist(episodes), meta / "file-000.parquet")
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory: Any) -> Path:
    return write_lerobot(tmp_path_factory.mktemp("lerobot") / "l")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_info_json_is_read_or_refused_by_name(written: Path, data: st.DataObject) -> None:
    path = written / "meta" / "info.json"
    text = path.read_text()
    path.write_text(json.dumps(data.draw(changed(json.loads(text)))))
    try:
        recording = lerobot.read(written, "")
        recording.read(0)
    except FileError as error:
        reason = str(error)
        assert str(written) in reason
        assert "\n" not in reason
    finally:
        path.write_text(text)


def change(folder: Path, file: str, column: str, row: int, value: Any) -> None:
    table = parquet.read_table(folder / file)
    values = table[column].to_pylist()
    values[row] = value
    field = table.schema.get_field_index(column)
    parquet.write_table(
        table.set_column(field, table.schema.field(column), pa.array(values, table[column].type)), folder / file
    )


def edit_info(folder: Path, **values: Any) -> None:
    path = folder / "meta" / "info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def import_lerobot(folder: Path, key: str = "") -> EpisodeStore:
    read_source(f"lerobot:{folder}{key}", folder.parent / "store")
    return EpisodeStore(folder.parent / "store")


@pytest.mark.parametrize("is_video", [True, False], ids=["video", "images"])
def test_the_last_row_of_an_episode_gives_its_frame_and_no_action(tmp_path: Path, is_video: bool) -> None:
    store = import_lerobot(write_lerobot(tmp_path / "l", is_video=is_video))
    assert store.lengths.tolist() == [3, 2, 4]
    assert store.facts.state_names == ("state/pan", "state/lift")
    for number, length in enumerate(LENGTHS):
        episode = store.episode(number)
        seen = episode.frames[:, :, [4, -4], 16].astype(int)  # [T + 1, 3, 2]
        expected = np.stack([40 * np.arange(length), np.full(length, 60 * number)], axis=1)
        assert np.abs(seen - expected[:, None]).max() <= (6 if is_video else 0)
        assert episode.states.tolist() == [[number, t] for t in range(length)]
        assert episode.actions.tolist() == [[number, t + 0.5] for t in range(length - 1)]
        assert episode.rewards.tolist() == list(range(length - 1))
        assert not episode.terminated.any()  # the end belongs to the action whose outcome was not recorded


def test_times_that_are_rounded_find_their_frames(tmp_path: Path) -> None:
    folder = write_lerobot(tmp_path / "l")
    change(folder, "meta/episodes/chunk-000/file-000.parquet", f"videos/{TOP}/from_timestamp", 1, 4 / FPS - 0.004)
    assert import_lerobot(folder).episode(1).frames[:, 0, 4, 16].astype(int) == pytest.approx([0, 40, 80], abs=6)


def test_several_cameras_are_named(tmp_path: Path) -> None:
    folder = write_lerobot(tmp_path / "l", features=FEATURES | {WRIST: FEATURES[TOP]})
    with pytest.raises(FileError, match=f"has several cameras: {TOP}, {WRIST}; choose one as in PATH@{TOP}"):
        import_lerobot(folder)
    assert len(import_lerobot(folder, f"@{TOP}")) == 3


def test_depth_maps_are_no_cameras(tmp_path: Path) -> None:
    depth = FEATURES[TOP] | {"info": {"is_depth_map": True}}
    assert len(import_lerobot(write_lerobot(tmp_path / "l", features=FEATURES | {WRIST: depth}))) == 3


def test_an_episode_of_one_frame_is_left_out(tmp_path: Path) -> None:
    assert import_lerobot(write_lerobot(tmp_path / "l", lengths=(4, 1, 3))).lengths.tolist() == [3, 2]


def test_whole_numbers_are_discrete_actions(tmp_path: Path) -> None:
    write_store(tmp_path / "s", [3, 4], actions=DISCRETE, shape=(3, 32, 32))
    write_export(f"lerobot:{tmp_path / 'l'}", tmp_path / "s")
    info = json.loads((tmp_path / "l" / "meta" / "info.json").read_text())
    assert (info["features"]["action"]["dtype"], info["features"]["action"]["shape"]) == ("int64", [1])
    info["features"]["action"].pop("info")  # of ours; without it the largest recorded action tells the number
    edit_info(tmp_path / "l", features=info["features"])
    assert import_lerobot(tmp_path / "l").facts.actions.num_actions == 5


DATA, EPISODES = "data/chunk-000/file-000.parquet", "meta/episodes/chunk-000/file-000.parquet"


@pytest.mark.parametrize(
    ("info", "reason"),
    [
        (
            {"codebase_version": "v2.1"},
            "codebase_version v2.1, version 3 is read; LeRobot's convert_dataset_v21_to_v30",
        ),
        ({"features": {name: FEATURES[name] for name in FEATURES if name != TOP}}, "has no camera"),
        ({"features": {TOP: FEATURES[TOP]}}, "has no feature action"),
        (
            {"features": FEATURES | {"next.success": FEATURES["next.done"], "action": {"dtype": 3}}},
            "action lacks shape",
        ),
        ({"video_path": "videos/{episode_index}.mp4"}, "video_path videos/.*; expected videos/"),
        ({"fps": 0}, "fps"),
    ],
)
def test_other_datasets_are_refused(tmp_path: Path, info: dict[str, Any], reason: str) -> None:
    folder = write_lerobot(tmp_path / "l", **info)
    with pytest.raises(FileError, match=rf"info\.json.*{reason}"):
        import_lerobot(folder)


@pytest.mark.parametrize(
    ("file", "column", "row", "value", "reason"),
    [
        (DATA, "action", 1, [float("nan"), 0.0], r"episode 0: the action of step 1 is \[nan"),
        (DATA, "action", 1, None, "action"),
        (DATA, "frame_index", 1, 7, "episode 0 has 4 rows in data, and meta says 4; their frame_index counts"),
        (DATA, "episode_index", 3, 1, "episode 0 has 3 rows in data, and meta says 4"),
        (EPISODES, "length", 1, 9, "episode 1 has 3 rows in data, and meta says 9"),
        (EPISODES, f"videos/{TOP}/from_timestamp", 1, 9.0, r"file-000\.mp4: the frames of episode 1 cannot be read"),
        (EPISODES, f"videos/{TOP}/file_index", 1, 5, r"file-005\.mp4: the frames of episode 1"),
        (EPISODES, f"videos/{TOP}/file_index", 1, None, "holds no episodes, or some without"),
    ],
)
def test_rows_that_do_not_fit_are_refused_by_episode(
    tmp_path: Path, file: str, column: str, row: int, value: Any, reason: str
) -> None:
    folder = write_lerobot(tmp_path / "l")
    change(folder, file, column, row, value)
    with pytest.raises(FileError, match=reason):
        import_lerobot(folder)


def test_a_video_that_ends_too_early_is_refused_with_the_number_of_frames(tmp_path: Path) -> None:
    folder = write_lerobot(tmp_path / "l")
    path = folder / "videos" / TOP / "chunk-000" / "file-000.mp4"
    write_video(path, np.concatenate([pictures(0, 4), pictures(1, 2)]))
    with pytest.raises(FileError, match=r"episode 1 cannot be read \(1 of 3 are lacking, the first at 0\.200 s\)"):
        import_lerobot(folder)


@pytest.mark.parametrize(
    "name", ["meta/info.json", DATA, EPISODES, f"videos/{TOP}/chunk-000/file-001.mp4", "data", "meta/episodes"]
)
def test_a_lacking_or_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    folder = write_lerobot(tmp_path / "l")
    path = folder / name
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(FileError, match=str(path)):
            import_lerobot(folder)
        path.unlink()
    with pytest.raises(FileError, match=str(folder if name == DATA else path if name != EPISODES else path.parents[1])):
        import_lerobot(folder)


def test_an_export_has_the_layout_of_version_3(tmp_path: Path) -> None:
    write_store(tmp_path / "store", [3, 1, 2], shape=(3, 32, 48), group=2)
    write_export(f"lerobot:{tmp_path / 'l'}", tmp_path / "store")
    names = sorted(str(path.relative_to(tmp_path / "l")) for path in (tmp_path / "l").rglob("*") if path.is_file())
    video = "videos/observation.image/chunk-000"
    assert names == [
        DATA, DATA.replace("file-000", "file-001"), EPISODES,
        "meta/info.json", "meta/stats.json", "meta/tasks.parquet", f"{video}/file-000.mp4", f"{video}/file-001.mp4",
    ]  # fmt: skip
    info = json.loads((tmp_path / "l" / "meta" / "info.json").read_text())
    assert (info["codebase_version"], info["total_episodes"], info["total_frames"]) == ("v3.0", 3, 9)
    episodes = parquet.read_table(tmp_path / "l" / EPISODES).to_pylist()
    assert [(row["dataset_from_index"], row["dataset_to_index"], row["length"]) for row in episodes] == [
        (0, 4, 4), (4, 6, 2), (6, 9, 3),
    ]  # fmt: skip
    begins = [row["videos/observation.image/from_timestamp"] * info["fps"] for row in episodes]
    assert begins == pytest.approx([0, 4, 0])
    rows = parquet.read_table(tmp_path / "l" / DATA).to_pylist()
    assert [row["action"] for row in rows] == [[0, 0], [0, 1], [0, 2], [0, 2], [1, 0], [1, 0]]
    assert [row["next.reward"] for row in rows] == [0, 1, 2, 0, 100, 0]
    assert [row["index"] for row in rows] == list(range(6))
    with av.open(str(tmp_path / "l" / video / "file-000.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        assert sum(1 for _ in container.decode(video=0)) == 6


def test_odd_sides_are_written_too(tmp_path: Path) -> None:
    written = write_store(tmp_path / "s", [2], shape=(3, 33, 35))
    write_export(f"lerobot:{tmp_path / 'l'}", tmp_path / "s")
    loss = import_lerobot(tmp_path / "l").episode(0).frames.astype(int) - written[0].frames
    assert np.abs(loss).max() <= 3
