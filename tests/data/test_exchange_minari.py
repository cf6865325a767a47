"""Minari datasets as Minari writes them: images as arrays and as JPEG, spaces, groups of observations, damage."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile_files import changed
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from stored_episodes import write_store

from jepa.data import minari
from jepa.data.episode_store import EpisodeStore
from jepa.data.exchange import read_source, write_export
from jepa.errors import FileError

h5py = pytest.importorskip("h5py")
BOX = {"type": "Box", "dtype": "float32", "shape": [2], "low": [-1.0, -np.inf], "high": [1.0, np.inf]}


def jpeg(picture: np.ndarray) -> np.ndarray:
    """As Minari's encode_frame"""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="JPEG")
    return np.frombuffer(buffer.getvalue(), dtype=np.uint8)


def pictures(length: int, size: int = 40) -> np.ndarray:
    """[T + 1, H, W, 3]; frame t has the value 20 t"""
    return np.repeat(20 * np.arange(length + 1, dtype=np.uint8), size * size * 3).reshape(-1, size, size, 3)


def write_minari(
    folder: Path, lengths: tuple[int, ...] = (3, 2), *, observations: Callable[[Any, int], None], space: Any = BOX,
    actions: Callable[[int], np.ndarray] = lambda length: np.arange(2.0 * length).reshape(length, 2), **metadata: Any,
) -> Path:  # fmt: skip
    """As HDF5Storage.update_episodes of Minari 0.5.4"""
    (folder / "data").mkdir(parents=True)
    with h5py.File(folder / "data" / "main_data.hdf5", "w", track_order=True) as data:
        for number, length in enumerate(lengths):
            group = data.create_group(f"episode_{number}")
            group.attrs.update({"id": number, "total_steps": length, "seed": number})
            observations(group, length)
            values = {
                "actions": actions(length), "rewards": np.arange(length, dtype=float),
                "terminations": np.arange(length) == length - 1, "truncations": np.zeros(length, dtype=bool),
            }  # fmt: skip
            for name, value in values.items():
                group.create_dataset(name, data=value, chunks=True, maxshape=(None, *value.shape[1:]))
            group.create_group("infos")["success"] = np.zeros(length + 1)
    content = {
        "total_episodes": len(lengths), "total_steps": sum(lengths), "data_format": "hdf5", "jpeg_encoding": True,
        "observation_space": "{}", "action_space": json.dumps(space), "dataset_id": "t/v0", "minari_version": "0.5.3",
    }  # fmt: skip
    (folder / "data" / "metadata.json").write_text(json.dumps(content | metadata))
    return folder


def array(group: Any, length: int) -> None:
    group["observations"] = pictures(length)


def jpegs(group: Any, length: int) -> None:
    """Files of several lengths"""
    files = [jpeg(np.concatenate([p[: 20 + t], 255 - p[20 + t :]])) for t, p in enumerate(pictures(length))]
    data = group.create_group("observations").create_dataset("pixels", (length + 1,), h5py.vlen_dtype(np.uint8))
    for row, file in enumerate(files):
        data[row] = file


def equal_jpegs(group: Any, length: int) -> None:
    """Files of one length are a matrix."""
    group["observations"] = np.stack([jpeg(picture) for picture in pictures(length)])


def import_minari(folder: Path, key: str = "") -> EpisodeStore:
    read_source(f"minari:{folder}{key}", folder.parent / "store")
    return EpisodeStore(folder.parent / "store")


@pytest.mark.parametrize("observations", [array, jpegs, equal_jpegs])
def test_frame_k_precedes_action_k_and_the_last_frame_is_kept(tmp_path: Path, observations: Any) -> None:
    store = import_minari(write_minari(tmp_path / "m", observations=observations))
    assert store.lengths.tolist() == [3, 2]
    first = store.episode(0)
    assert np.abs(first.frames[:, 0, 0, 0].astype(int) - [0, 20, 40, 60]).max() <= 2
    assert first.actions.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert first.rewards.tolist() == [0, 1, 2]
    assert first.terminated.tolist() == [False, False, True]


@pytest.mark.parametrize("part", ["", "data", "data/main_data.hdf5"])
def test_the_dataset_its_data_folder_or_its_file_is_named(tmp_path: Path, part: str) -> None:
    folder = write_minari(tmp_path / "m", observations=array)
    read_source(f"minari:{folder / part}", tmp_path / "store")
    assert len(EpisodeStore(tmp_path / "store")) == 2


def test_numbers_among_the_observations_are_states(tmp_path: Path) -> None:
    def observations(group: Any, length: int) -> None:
        node = group.create_group("observations")
        node["pixels"] = pictures(length)
        node["robot/position"] = np.stack([np.arange(length + 1.0), -np.arange(length + 1.0)], axis=1)
        node["mission"] = np.arange(length + 1)
        node["text"] = ["go"] * (length + 1)

    store = import_minari(write_minari(tmp_path / "m", observations=observations))
    assert store.facts.state_names == ("mission/0", "robot/position/0", "robot/position/1")
    assert store.episode(0).states.tolist() == [[0, 0, 0], [1, 1, -1], [2, 2, -2], [3, 3, -3]]


def test_axes_without_bounds_get_those_of_the_records(tmp_path: Path) -> None:
    space = import_minari(write_minari(tmp_path / "m", observations=array)).facts.actions
    assert (space.low, space.high) == ((-1, 1), (1, 5))


def test_discrete_actions_are_counted_from_zero(tmp_path: Path) -> None:
    space = {"type": "Discrete", "dtype": "int64", "start": 2, "n": 7}
    numbers = lambda length: np.arange(length) + 2  # noqa: E731
    store = import_minari(write_minari(tmp_path / "m", observations=array, space=space, actions=numbers))
    assert store.facts.actions.num_actions == 7
    assert store.episode(0).actions.tolist() == [0, 1, 2]


def test_one_of_several_cameras_is_chosen_by_name(tmp_path: Path) -> None:
    def observations(group: Any, length: int) -> None:
        node = group.create_group("observations")
        node["left"], node["right"] = pictures(length), 255 - pictures(length)

    folder = write_minari(tmp_path / "m", observations=observations)
    with pytest.raises(FileError, match="has several cameras: left, right; choose one as in PATH@left"):
        import_minari(folder)
    with pytest.raises(FileError, match="has no camera top; it has left, right"):
        import_minari(folder, "@top")
    assert import_minari(folder, "@right").episode(0).frames[:, 0, 0, 0].tolist() == [255, 235, 215, 195]


def test_small_arrays_are_pictures_only_if_they_are_named(tmp_path: Path) -> None:
    def observations(group: Any, length: int) -> None:
        group["observations/grid/image"] = np.zeros((length + 1, 7, 7, 3), dtype=np.uint8)

    folder = write_minari(tmp_path / "m", observations=observations)
    with pytest.raises(FileError, match=r"the array grid/image \(7, 7, 3\), which may be no picture.*PATH@grid/image"):
        import_minari(folder)
    assert import_minari(folder, "@grid/image").facts.frame_shape == (3, 7, 7)


def test_an_episode_without_a_step_is_left_out(tmp_path: Path) -> None:
    store = import_minari(write_minari(tmp_path / "m", (2, 0, 3), observations=array))
    assert store.lengths.tolist() == [2, 3]


def test_the_eleventh_episode_comes_after_the_tenth(tmp_path: Path) -> None:
    lengths = tuple(range(1, 13))
    assert import_minari(write_minari(tmp_path / "m", lengths, observations=array)).lengths.tolist() == list(lengths)


def vectors(group: Any, length: int) -> None:
    group["observations"] = np.zeros((length + 1, 4))


def late(group: Any, length: int) -> None:
    group["observations"] = pictures(length - 1)


def growing(group: Any, length: int) -> None:
    data = group.create_dataset("observations", (length + 1,), h5py.vlen_dtype(np.uint8))
    for row in range(length + 1):
        data[row] = jpeg(pictures(0, 32 + row)[0])


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"observations": vectors}, "has no camera"),
        ({"observations": late}, "episode_0 has 3 actions and 2 observations"),
        ({"observations": growing}, r"episode_0/observations: frame 1 has the size \(33, 33\), the first \(32, 32\)"),
        (
            {"observations": array, "actions": lambda n: np.full((n, 2), np.nan)},
            r"episode_0: the action of step 0 is \[nan",
        ),
        ({"observations": array, "data_format": "arrow"}, "data_format arrow, only hdf5 is read"),
        ({"observations": array, "action_space": "[]"}, r"metadata\.json: action_space holds no mapping"),
        ({"observations": array, "space": {"type": "MultiBinary", "n": 3}}, "MultiBinary; Box and Discrete are read"),
        (
            {"observations": array, "space": BOX | {"low": [0], "high": [1]}},
            "actions of 2 numbers, and action_space has 1",
        ),
        ({"observations": array, "space": BOX | {"low": [[], 1]}}, "its bounds are no numbers"),
        (
            {"observations": array, "actions": np.arange, "space": {"type": "Discrete", "start": 0, "n": 2}},
            "actions that are none of the 2 of action_space",
        ),
        ({"observations": array, "lengths": ()}, "holds no group episode_0"),
        ({"observations": array, "lengths": (0,)}, "left out: 1 episodes of one frame; nothing is there to store"),
    ],
)
def test_what_cannot_be_read_rightly_is_refused(tmp_path: Path, arguments: dict[str, Any], reason: str) -> None:
    folder = write_minari(tmp_path / "m", **arguments)
    with pytest.raises(FileError, match=reason):
        import_minari(folder)
    assert not list(tmp_path.glob("store/group-*"))


@pytest.mark.parametrize("name", ["actions", "observations", "rewards", "terminations", "truncations"])
def test_a_lacking_array_is_named(tmp_path: Path, name: str) -> None:
    folder = write_minari(tmp_path / "m", observations=array)
    with h5py.File(folder / "data" / "main_data.hdf5", "a") as data:
        del data[f"episode_1/{name}"]
    with pytest.raises(FileError, match=f"episode_1 has no {name}"):
        import_minari(folder)


@pytest.fixture(scope="module")
def written(tmp_path_factory: Any) -> Path:
    return write_minari(tmp_path_factory.mktemp("minari") / "m", observations=array)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_metadata_json_is_read_or_refused_by_name(written: Path, data: st.DataObject) -> None:
    path = written / "data" / "metadata.json"
    text = path.read_text()
    content = json.loads(text)
    if data.draw(st.booleans()):
        path.write_text(json.dumps(data.draw(changed(content))))
    else:
        path.write_text(json.dumps(content | {"action_space": json.dumps(data.draw(changed(BOX)))}))
    try:
        minari.read(written, "").read(0)
    except FileError as error:
        reason = str(error)
        assert str(written) in reason
        assert "\n" not in reason
    finally:
        path.write_text(text)


@pytest.mark.parametrize("damage", ["truncated", "text"])
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    folder = write_minari(tmp_path / "m", observations=array)
    file = folder / "data" / "main_data.hdf5"
    file.write_bytes(file.read_bytes()[:3000] if damage == "truncated" else b"no HDF5")
    with pytest.raises(FileError, match=r"main_data\.hdf5 cannot be read"):
        import_minari(folder)


def test_an_export_has_the_layout_of_minari(tmp_path: Path) -> None:
    written = write_store(tmp_path / "store", [3, 2], shape=(3, 40, 48))
    write_export(f"minari:{tmp_path / 'two rooms'}", tmp_path / "store")
    metadata = json.loads((tmp_path / "two rooms" / "data" / "metadata.json").read_text())
    assert metadata["dataset_id"] == "jepa/two-rooms-v0"
    assert (metadata["total_episodes"], metadata["total_steps"], metadata["jpeg_encoding"]) == (2, 5, False)
    subspaces = json.loads(metadata["observation_space"])["subspaces"]
    assert {name: (space["type"], space["dtype"], space["shape"]) for name, space in subspaces.items()} == {
        "image": ("Box", "uint8", [40, 48, 3]), "state": ("Box", "float32", [2]),
    }  # fmt: skip
    with h5py.File(tmp_path / "two rooms" / "data" / "main_data.hdf5") as data:
        group = data["episode_1"]
        assert dict(group.attrs) == {"id": 1, "total_steps": 2}
        assert np.array_equal(group["observations/image"], written[1].frames.transpose(0, 2, 3, 1))
        assert [len(group[name]) for name in ("actions", "rewards", "terminations", "truncations")] == [2] * 4


def test_minari_reads_an_export(tmp_path: Path) -> None:
    package = pytest.importorskip("minari")
    written = write_store(tmp_path / "store", [3, 2], shape=(3, 40, 48))
    write_export(f"minari:{tmp_path / 'exported'}", tmp_path / "store")
    episodes = list(package.MinariDataset(tmp_path / "exported" / "data"))
    for episode, expected in zip(episodes, written, strict=True):
        assert np.array_equal(episode.observations["image"].transpose(0, 3, 1, 2), expected.frames)
        assert np.array_equal(episode.actions, expected.actions)
