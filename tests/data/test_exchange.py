"""Import and export of episodes in every format: there and back, resumed, and refused in one line."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from stored_episodes import CONTINUOUS, DISCRETE, NAMES, write_store

from jepa.data import exchange
from jepa.data.episode_store import Episode, EpisodeStore, StoreFacts, append, writing
from jepa.data.episodes import Episodes
from jepa.data.exchange import read_source, write_export
from jepa.errors import FileError, RunError

for package in ("av", "h5py", "pyarrow"):
    pytest.importorskip(package)
SHARED = Path(__file__).parents[3] / "shared" / "data"
KINDS = ("frames", "lerobot", "minari")
LENGTHS = (3, 1, 5, 2)


def there_and_back(folder: Path, kind: str) -> EpisodeStore:
    write_export(f"{kind}:{folder / 'exported'}", folder / "store")
    read_source(f"{kind}:{folder / 'exported'}", folder / "back")
    return EpisodeStore(folder / "back")


def assert_equal(one: Episode, other: Episode, pixels: float = 0.0) -> None:
    """Types, shapes and values, but for lossy pixels."""
    for name, a, b in zip(Episode._fields, one, other, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), name
        loss = np.abs(a.astype(float) - b.astype(float)).max(initial=0)
        assert loss <= (pixels if name == "frames" else 0), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_discrete", [False, True], ids=["continuous", "discrete"])
@pytest.mark.parametrize("shape", [(3, 32, 48), (1, 32, 32)], ids=["colour", "grey"])
def test_there_and_back_every_frame_keeps_its_action(
    tmp_path: Path, kind: str, is_discrete: bool, shape: tuple[int, int, int]
) -> None:
    space, states = (DISCRETE, 0) if is_discrete else (CONTINUOUS, 2)
    written = write_store(tmp_path / "store", LENGTHS, actions=space, states=states, shape=shape)
    back = there_and_back(tmp_path, kind)
    assert back.lengths.tolist() == list(LENGTHS)
    assert (back.facts.frame_shape, back.facts.state_names) == (shape, NAMES[:states])
    if kind != "frames":  # a CSV has no place for bounds
        assert back.facts.actions == space
    for number, expected in enumerate(written):
        assert_equal(back.episode(number), expected, pixels=3 if kind == "lerobot" else 0)


@pytest.mark.parametrize("kind", KINDS)
def test_actions_between_two_numbers_and_noise_come_back(tmp_path: Path, kind: str) -> None:
    random = np.random.default_rng(0)
    frames = np.repeat(random.integers(0, 256, (6, 3, 4, 4), dtype=np.uint8), 8, axis=2).repeat(8, axis=3)
    actions = random.normal(size=(5, 3)).astype(np.float32)
    length = np.zeros(5, dtype=bool)
    states, rewards = np.zeros((6, 0), dtype=np.float32), random.normal(size=5).astype(np.float32)
    with writing(tmp_path / "store", StoreFacts(frame_shape=(3, 32, 32), actions=exchange.lerobot.bounded(actions))):
        append(tmp_path / "store", [written := Episode(frames, states, actions, rewards, length, length)])
    back = there_and_back(tmp_path, kind)
    loss = np.abs(back.episode(0).frames.astype(float) - frames).mean()
    assert loss < (16 if kind == "lerobot" else 1e-9)
    assert_equal(back.episode(0), written, pixels=255)


@pytest.mark.parametrize("kind", KINDS)
def test_an_import_that_was_interrupted_goes_on_where_it_was(tmp_path: Path, monkeypatch: Any, kind: str) -> None:
    write_store(tmp_path / "store", LENGTHS, shape=(3, 32, 32))
    whole = there_and_back(tmp_path, kind)
    monkeypatch.setattr(exchange, "GROUP_BYTES", 1)  # one episode in a group
    checked, seen = exchange.checked, []

    def interrupted(recording: Any, number: int, path: Path) -> Episode:
        seen.append(number)
        if seen == [0, 1, 2]:
            raise KeyboardInterrupt
        return checked(recording, number, path)

    monkeypatch.setattr(exchange, "checked", interrupted)
    source = f"{kind}:{tmp_path / 'exported'}"
    with pytest.raises(KeyboardInterrupt):
        read_source(source, tmp_path / "parts")
    assert len(EpisodeStore(tmp_path / "parts")) == 2
    read_source(source, tmp_path / "parts")
    read_source(source, tmp_path / "parts")
    assert seen == [0, 1, 2, 2, 3]
    parts = EpisodeStore(tmp_path / "parts")
    for number in range(len(LENGTHS)):
        assert_equal(parts.episode(number), whole.episode(number))


@pytest.mark.parametrize("kind", KINDS)
def test_frames_of_differing_sizes_are_refused(tmp_path: Path, kind: str) -> None:
    write_store(tmp_path / "store", [3], shape=(3, 32, 32))
    write_store(tmp_path / "other", [3], shape=(3, 48, 32))
    for name in ("store", "other"):
        write_export(f"{kind}:{tmp_path / name}-exported", tmp_path / name)
    merge = {"frames": merge_frames, "minari": merge_minari, "lerobot": merge_lerobot}[kind]
    merge(tmp_path / "store-exported", tmp_path / "other-exported")
    with pytest.raises(FileError, match=r"frames of \(4, 3, 48, 32\), expected \(4, 3, 32, 32\)"):
        read_source(f"{kind}:{tmp_path / 'store-exported'}", tmp_path / "back")


def merge_frames(one: Path, other: Path) -> None:
    shutil.copytree(other / "frames" / "ep000", one / "frames" / "ep001")
    rows = (other / "steps.csv").read_text().splitlines()[1:]
    text = "\n".join(row.replace("0,", "1,", 1).replace("ep000", "ep001") for row in rows)
    (one / "steps.csv").write_text((one / "steps.csv").read_text() + text)


def merge_minari(one: Path, other: Path) -> None:
    import h5py

    with h5py.File(other / "data" / "main_data.hdf5") as source, h5py.File(one / "data" / "main_data.hdf5", "a") as to:
        source.copy("episode_0", to, "episode_1")


def merge_lerobot(one: Path, other: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    for folder in ("data", "meta/episodes"):
        table = parquet.read_table(other / folder / "chunk-000" / "file-000.parquet").to_pydict()
        for column in {"episode_index", "videos/observation.image/file_index"} & set(table):
            table[column] = [1] * len(table[column])
        parquet.write_table(pa.table(table), one / folder / "chunk-000" / "file-001.parquet")
    video = Path("videos", "observation.image", "chunk-000")
    shutil.copy(other / video / "file-000.mp4", one / video / "file-001.mp4")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("zarr:here", "unknown kind 'zarr'; expected lerobot:PATH, minari:PATH, frames:PATH"),
        ("minary:here", "did you mean"),
        ("here", "unknown kind 'here'"),
        ("minari:", "expected lerobot:PATH"),
        ("minari:nowhere", "there is no .*/nowhere; .* holds nothing"),
    ],
)
def test_a_source_that_names_nothing_is_refused(tmp_path: Path, monkeypatch: Any, source: str, reason: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileError, match=reason):
        read_source(source, tmp_path / "store")
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_folder_is_no_source(tmp_path: Path, kind: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileError, match=str(tmp_path / "empty")) as refusal:
        read_source(f"{kind}:{tmp_path / 'empty'}", tmp_path / "store")
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_package_is_named_with_the_command(tmp_path: Path, monkeypatch: Any, kind: str) -> None:
    packages = {"frames": [], "lerobot": ["pyarrow", "av"], "minari": ["h5py"]}[kind]
    write_store(tmp_path / "store", [2], shape=(3, 32, 32))
    for package in packages:
        monkeypatch.setitem(__import__("sys").modules, package, None)
        for call, text in ((read_source, f"{kind}:{tmp_path}"), (write_export, f"{kind}:{tmp_path / 'exported'}")):
            with pytest.raises(FileError, match=rf"{package}.*: pip install 'jepa-train\[episodes\]'"):
                call(text, tmp_path / "store")
    assert not (tmp_path / "exported").exists()


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    write_store(tmp_path / "store", [2, 2], shape=(3, 32, 32))
    write_export(f"minari:{tmp_path / 'exported'}", tmp_path / "store")
    with pytest.raises(RunError, match=r"of source=, and source=minari:.* was asked for; give another"):
        read_source(f"minari:{tmp_path / 'exported'}", tmp_path / "store")
    with pytest.raises(RunError, match="is no store of episodes, it holds data; give another folder"):
        read_source(f"minari:{tmp_path / 'exported'}", tmp_path / "exported")
    assert len(EpisodeStore(tmp_path / "store")) == 2


def test_a_source_that_became_another_is_refused(tmp_path: Path) -> None:
    write_store(tmp_path / "store", [2, 3], shape=(3, 32, 32))
    there_and_back(tmp_path, "minari")
    shutil.rmtree(tmp_path / "exported")
    shutil.rmtree(tmp_path / "store")
    write_store(tmp_path / "store", [2, 4, 3], shape=(3, 32, 32))
    with pytest.raises(FileError, match=r"holds other episodes than .*exported has now; give another folder"):
        there_and_back(tmp_path, "minari")


def test_an_export_overwrites_nothing_and_leaves_nothing_half(tmp_path: Path, monkeypatch: Any) -> None:
    write_store(tmp_path / "store", [2], shape=(3, 32, 32))
    (tmp_path / "there").mkdir()
    with pytest.raises(FileError, match="a path without @ is needed"):
        write_export(f"minari:{tmp_path / 'a@b'}", tmp_path / "store")
    with pytest.raises(FileError, match="there exists already; give another path"):
        write_export(f"minari:{tmp_path / 'there'}", tmp_path / "store")
    monkeypatch.setattr(exchange.minari, "_metadata", lambda *_: {}[0])
    with pytest.raises(KeyError):
        write_export(f"minari:{tmp_path / 'new'}", tmp_path / "store")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store", "there"]
    with writing(tmp_path / "empty", StoreFacts(frame_shape=(3, 32, 32), actions=CONTINUOUS)):
        pass
    with pytest.raises(FileError, match="empty holds no episodes to export"):
        write_export(f"minari:{tmp_path / 'new'}", tmp_path / "empty")


def write_log(folder: Path, rows: str, size: tuple[int, int] = (8, 6)) -> Path:
    """A driving log; frame t of an episode has the value 10 t."""
    (folder / "frames").mkdir(parents=True, exist_ok=True)
    (folder / "steps.csv").write_text(rows)
    for row in rows.splitlines()[1:]:
        episode, t, file = row.split(",")[:3]
        path = folder / "frames" / file
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", size, (10 * int(t), int(episode), 0)).save(path)
    return folder


LOG = (
    "episode,t,file,angle,throttle,timestamp_ms\n"
    "0,0,a/0.png,0.1,0.5,1000\n0,1,a/1.png,0.2,0.5,1050\n0,2,a/2.png,0.3,0.5,1100\n"
    "1,0,b/0.png,0.9,0.9,1900\n"
    "2,0,c/0.png,-0.4,0.6,2000\n2,1,c/1.png,,,2050\n"
)


def import_log(folder: Path, rows: str = LOG, key: str = "") -> EpisodeStore:
    read_source(f"frames:{write_log(folder / 'log', rows)}{key}", folder / "store")
    return EpisodeStore(folder / "store")


@pytest.mark.parametrize("is_tar", [False, True], ids=["folder", "tar"])
def test_row_k_of_a_log_leads_from_frame_k_to_the_next(tmp_path: Path, is_tar: bool, caplog: Any) -> None:
    write_log(tmp_path / "log", LOG)
    path = tmp_path / "log"
    if is_tar:
        path = Path(shutil.make_archive(str(tmp_path / "packed"), "tar", tmp_path, "log"))
    with caplog.at_level(logging.INFO):
        read_source(f"frames:{path}", tmp_path / "store")
    assert caplog.messages[-1].endswith("5 frames in 2 episodes; left out: 1 episodes of one frame")
    store = EpisodeStore(tmp_path / "store")
    first, second = store.episode(0), store.episode(1)
    assert first.frames[:, 0, 0, 0].tolist() == [0, 10, 20]
    assert np.allclose(first.actions, [[0.1, 0.5], [0.2, 0.5]])  # 0.3 has no outcome
    assert second.frames[:, 0, 0, 0].tolist() == [0, 10]
    assert np.allclose(second.actions, [[-0.4, 0.6]])
    assert store.facts.actions.low == pytest.approx((-0.4, 0.5))
    assert not first.terminated.any() | first.truncated.any()


def test_the_columns_of_actions_are_chosen_by_name(tmp_path: Path) -> None:
    store = import_log(tmp_path, key="@throttle")
    assert store.facts.actions.low == pytest.approx((0.5,))
    with pytest.raises(FileError, match="no column brake; it has episode, t, file, angle"):
        import_log(tmp_path, key="@angle+brake")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("0.2,0.5,1050", "nan,0.5,1050"), r"line 2 and after: the action of step 1 is \[nan"),
        (("0.2,0.5,1050", ",0.5,1050"), r"the action of step 1 is \[nan"),
        (("0.2,0.5,1050", "left,0.5,1050"), "line 3: angle is 'left', no number; name the columns"),
        (("0,2,a/2", "0,4,a/4"), "line 4: t of episode 0 does not follow"),
        ((",angle,throttle,timestamp_ms", ",timestamp_a,timestamp_b,timestamp_ms"), "no columns of actions"),
        ((",file,", ",picture,"), "no column file with the frames"),
        (("0.2,0.5,1050", "0.2,0.5"), "has 5 values, the first line 6"),
    ],
)
def test_a_log_that_breaks_the_rule_of_time_is_refused_by_line(
    tmp_path: Path, change: tuple[str, str], reason: str
) -> None:
    with pytest.raises(FileError, match=reason):
        import_log(tmp_path, LOG.replace(*change))
    assert not (tmp_path / "store").exists()


def test_frames_of_a_log_that_are_lacking_damaged_or_of_another_size_are_named(tmp_path: Path) -> None:
    frame = write_log(tmp_path / "log", LOG) / "frames" / "a" / "1.png"
    Image.new("RGB", (9, 6)).save(frame)
    for reason in (
        r"a/1\.png is 9 x 6, another size than a/0\.png",
        r"a/1\.png cannot be read",
        r"no a/1\.png, beside",
    ):
        with pytest.raises(FileError, match=reason):
            read_source(f"frames:{tmp_path / 'log'}", tmp_path / "store")
        frame.unlink() if frame.exists() and frame.stat().st_size == 0 else frame.write_bytes(b"")
    assert len(EpisodeStore(tmp_path / "store")) == 0


def test_a_log_needs_one_csv(tmp_path: Path) -> None:
    folder = write_log(tmp_path / "log", LOG)
    (folder / "more.csv").write_text("a\n1\n")
    with pytest.raises(FileError, match=r"holds .*more\.csv.*; expected one CSV"):
        read_source(f"frames:{folder}", tmp_path / "store")


def test_a_file_that_is_no_tar_is_refused(tmp_path: Path) -> None:
    (tmp_path / "log.tar").write_bytes(b"not a tar at all" * 100)
    with pytest.raises(FileError, match=r"log\.tar is no folder and no uncompressed tar"):
        read_source(f"frames:{tmp_path / 'log.tar'}", tmp_path / "store")


def test_whole_numbers_in_a_column_action_are_discrete(tmp_path: Path) -> None:
    rows = "episode,t,file,action\n0,0,a/0.png,2\n0,1,a/1.png,0\n0,2,a/2.png,\n"
    store = import_log(tmp_path, rows)
    assert store.facts.actions.num_actions == 3
    assert store.episode(0).actions.tolist() == [2, 0]
    with pytest.raises(FileError, match="the column action holds 0, no whole number"):
        import_log(tmp_path, rows.replace("a/0.png,2", "a/0.png,2.5"))


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "driving-rc-4k.tar").is_file(), reason="needs driving-rc-4k.tar")
def test_the_driving_log_is_imported(tmp_path: Path) -> None:
    read_source(f"frames:{SHARED / 'driving-rc-4k.tar'}", tmp_path / "store")
    store = EpisodeStore(tmp_path / "store")
    assert store.lengths.tolist() == [577, 651, 640, 589, 789, 574]
    assert store.facts.frame_shape == (3, 120, 160)
    assert np.allclose(store.episode(0).actions[:2], [[0, 0.149495], [0, 0.5]])
    windows = Episodes(num_frames=4, path=str(tmp_path / "store"), frame_skip=5, hop=5)
    assert windows.fields["actions"].shape == (3, 5, 2)
    assert windows[0].clip.shape == (3, 4, 120, 160)
