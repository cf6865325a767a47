"""Stored episodes: what is written is read, windows stay in their episode, damage is refused, processes share."""

from __future__ import annotations

import json
import logging
import multiprocessing
import pickle
import shutil
import tempfile
from itertools import islice, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from checked import checked
from hostile_files import changed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stored_episodes import CONTINUOUS, DISCRETE, NAMES, episode, same, write_store

from jepa.config import ConfigError, compose
from jepa.data import episode_store
from jepa.data.collect import collect
from jepa.data.episode_store import EpisodeStore, StoreFacts, append, writing
from jepa.data.episodes import MIN_STD, Episodes
from jepa.data.identity import changes, has_grown, identity
from jepa.data.loader import batches
from jepa.envs.policies import StickyRandom
from jepa.envs.two_rooms import TwoRooms
from jepa.errors import FileError, RunError
from jepa.training.assemble import needed_fields


def dataset(folder: Path, **arguments: Any) -> Episodes:
    return checked(Episodes, **{"num_frames": 3, "path": str(folder), "val_ratio": 0.0} | arguments)


def refusal(folder: Path) -> str | None:
    """Why a store is refused, None if it is read."""
    try:
        EpisodeStore(folder)
    except FileError as error:
        return str(error)
    return None


def test_every_value_is_read_as_it_was_written(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    written = write_store(tmp_path, [4])
    noise = written[0]._replace(frames=random.integers(0, 256, written[0].frames.shape, dtype=np.uint8))
    append(tmp_path, [noise])
    store = EpisodeStore(tmp_path)
    assert same(store.episode(0), written[0])
    assert same(store.episode(1), noise)


@pytest.mark.parametrize("group", [1, 2, 5])
def test_the_frame_after_a_reset_and_the_last_frame_are_kept(tmp_path: Path, group: int) -> None:
    lengths = [3, 1, 7, 2, 5]
    written = write_store(tmp_path, lengths, group=group)
    store = EpisodeStore(tmp_path)
    assert [len(store.episode(n).frames) for n in range(5)] == [4, 2, 8, 3, 6]
    assert store.lengths.tolist() == lengths
    assert all(same(store.episode(n), episode) for n, episode in enumerate(written))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6), num_frames=st.integers(1, 5),
    frame_skip=st.integers(1, 3), hop=st.integers(1, 4), is_discrete=st.booleans(),
)  # fmt: skip
def test_windows_never_cross_episodes_and_actions_lead_from_frame_to_frame(
    lengths: list[int], num_frames: int, frame_skip: int, hop: int, is_discrete: bool
) -> None:
    span = (num_frames - 1) * frame_skip
    expected = [(n, first) for n, length in enumerate(lengths) for first in range(0, length - span + 1, hop)]
    with tempfile.TemporaryDirectory() as folder:
        write_store(Path(folder), lengths, actions=DISCRETE if is_discrete else CONTINUOUS)
        keys = {"num_frames": num_frames, "frame_skip": frame_skip, "hop": hop}
        if not expected:
            with pytest.raises(ValueError, match="the longest has"):
                dataset(Path(folder), **keys)
            return
        windows = dataset(Path(folder), **keys)
        assert len(windows) == len(expected)
        for index, (number, first) in enumerate(expected):
            clip, _, fields = windows[index]
            times = torch.arange(first, first + span + 1, frame_skip)
            assert clip[0, :, 0, 0].tolist() == [number] * num_frames
            assert torch.equal(clip[0, :, 1, 1], times)
            assert torch.equal(fields["states"][:, 1], times)
            assert {name: (*value.shape,) for name, value in fields.items()} == {
                name: field.shape for name, field in windows.fields.items()
            }
            if num_frames > 1:
                steps = torch.arange(first, first + span).reshape(num_frames - 1, frame_skip)
                taken = (number + steps) % 5 if is_discrete else torch.stack([steps * 0 + number, steps], dim=2)
                assert torch.equal(fields["actions"], taken.squeeze(1) if frame_skip == 1 else taken)
                assert torch.equal(fields["rewards"], (100.0 * number + steps).sum(dim=1))
                ends = (steps == lengths[number] - 1).any(dim=1) & (number % 2 == 0)
                assert torch.equal(fields["terminated"], ends.float())


def test_a_window_of_one_frame_has_no_transitions(tmp_path: Path) -> None:
    write_store(tmp_path, [3, 1])
    windows = dataset(tmp_path, num_frames=1)
    assert len(windows) == 6
    assert set(windows.fields) == {"states", "quantities"}


def test_a_store_without_episodes_is_refused(tmp_path: Path) -> None:
    write_store(tmp_path, [])
    with pytest.raises(ValueError, match=f"dataset.path: {tmp_path} holds no episodes yet"):
        dataset(tmp_path)


def test_a_store_without_states_has_none(tmp_path: Path) -> None:
    write_store(tmp_path, [3], states=0)
    windows = dataset(tmp_path)
    assert set(windows[0].fields) == set(windows.fields) == {"actions", "rewards", "terminated"}


def test_the_quantities_are_the_state_of_the_last_frame(tmp_path: Path) -> None:
    write_store(tmp_path, [6])
    windows = dataset(tmp_path, frame_skip=2)
    assert windows.fields["quantities"].names == NAMES
    assert windows[1].fields["quantities"].tolist() == [0, 5]


def test_the_last_episodes_are_held_out(tmp_path: Path) -> None:
    write_store(tmp_path, [4] * 10)
    windows = dataset(tmp_path, val_ratio=0.2)
    held_out: Any = windows.validation()
    parts = [{part.source(index) for index in range(len(part))} for part in (windows, held_out)]
    assert parts == [set(range(8)), {8, 9}]
    assert held_out.validation() is None
    assert (held_out.mean, held_out.fields) == (windows.mean, windows.fields)
    assert dataset(tmp_path, val_ratio=0.0).validation() is None


def test_the_split_does_not_depend_on_the_windows(tmp_path: Path) -> None:
    write_store(tmp_path, [4, 1, 4, 1, 4, 4])
    for num_frames in (1, 3, 5):
        windows = dataset(tmp_path, num_frames=num_frames, val_ratio=0.3)
        assert (windows.numbers, windows.held_out_numbers) == (range(4), range(4, 6))


def test_held_out_episodes_that_are_too_short_leave_no_held_out_part(tmp_path: Path, caplog: Any) -> None:
    write_store(tmp_path, [4, 4, 4, 1])
    with caplog.at_level(logging.INFO):
        assert dataset(tmp_path, val_ratio=0.2).validation() is None
    assert caplog.messages[-1].endswith("held out: 0 episodes; left out: 1 episodes that are too short")


def test_episodes_that_are_too_short_are_left_out_and_counted(tmp_path: Path, caplog: Any) -> None:
    write_store(tmp_path, [4, 1, 1, 3, 2])
    with caplog.at_level(logging.INFO):
        windows = dataset(tmp_path, num_frames=4, val_ratio=0.2)
    assert {windows.source(index) for index in range(len(windows))} == {0, 3}
    summary = "3 windows of 4 frames in 4 episodes; held out: 0 episodes; left out: 3 episodes that are too short"
    assert caplog.messages[-1] == f"{tmp_path}: {summary}"


def test_mean_and_std_are_those_of_the_pixels(tmp_path: Path) -> None:
    write_store(tmp_path, [63] * 4, shape=(3, 2, 2))
    windows = dataset(tmp_path)
    frames = np.concatenate([windows.store.episode(n).frames for n in range(4)]) / 255  # [256, 3, 2, 2]
    assert windows.mean == pytest.approx(frames.mean(axis=(0, 2, 3)).tolist(), abs=2e-3)
    assert windows.std == pytest.approx(frames.std(axis=(0, 2, 3)).tolist(), abs=2e-3)


def test_nearly_constant_frames_keep_a_standard_deviation(tmp_path: Path) -> None:
    write_store(tmp_path, [2])
    assert dataset(tmp_path).std == (MIN_STD,)


def test_a_window_is_described_by_episode_and_frame(tmp_path: Path) -> None:
    write_store(tmp_path, [3, 4])
    windows = dataset(tmp_path)
    assert windows.describe(3) == f"episode 1 of {tmp_path} from frame 1 on"
    for index in (-1, len(windows)):
        with pytest.raises(IndexError):
            windows[index]


def test_a_store_is_read_while_it_grows(tmp_path: Path) -> None:
    write_store(tmp_path, [3, 3])
    before = EpisodeStore(tmp_path)
    append(tmp_path, [episode(2, 5)])
    (tmp_path / ".group-1").mkdir()  # of a writer that is at work
    assert len(before) == 2
    assert before.episode(1).frames.shape[0] == 4
    assert len(EpisodeStore(tmp_path)) == 3


@pytest.mark.parametrize("file", ["lengths.npy", "frames.npy", "truncated.npy"])
def test_a_writer_that_is_killed_leaves_no_half_group(tmp_path: Path, monkeypatch: Any, file: str) -> None:
    written = write_store(tmp_path, [3, 3])
    save = np.save

    def killed(path: Path, array: np.ndarray) -> None:
        save(path, array)
        if path.name == file:
            path.write_bytes(path.read_bytes()[:-4])
            raise KeyboardInterrupt

    monkeypatch.setattr(np, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        append(tmp_path, [episode(2, 5)])
    monkeypatch.undo()
    store = EpisodeStore(tmp_path)
    assert len(store) == 2
    with writing(tmp_path, store.facts):
        assert not list(tmp_path.glob(".group-*"))
        append(tmp_path, [written[0]])
    assert len(EpisodeStore(tmp_path)) == 3


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
    "other shape": lambda path: np.save(path, np.load(path)[:-1]),
    "other type": lambda path: np.save(path, np.load(path).astype(np.complex64)),
    "pickled": lambda path: np.save(path, np.array([{}] * len(np.load(path)), dtype=object), allow_pickle=True),
    "text": lambda path: path.write_text("frames"),
}


@pytest.mark.parametrize("name", ["lengths", "frames", "states", "actions", "rewards", "terminated", "truncated"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_refused_by_name_when_the_store_is_opened(tmp_path: Path, name: str, damage: str) -> None:
    write_store(tmp_path, [3, 4, 3, 4])
    DAMAGE[damage](tmp_path / "group-000001" / f"{name}.npy")
    with pytest.raises(FileError, match=r"group-000001/\w+\.npy .*remove group-000001 and the groups after it"):
        EpisodeStore(tmp_path)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 127), st.integers(0, 255))
def test_no_changed_byte_of_a_header_gives_a_traceback(position: int, value: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_store(Path(folder), [3])
        path = Path(folder) / "group-000000" / "actions.npy"
        content = bytearray(path.read_bytes())
        content[position] = value
        path.write_bytes(content)
        reason = refusal(Path(folder))
        assert reason is None or str(path) in reason


def test_a_missing_group_is_refused_by_name(tmp_path: Path) -> None:
    write_store(tmp_path, [3] * 6)
    shutil.rmtree(tmp_path / "group-000001")
    with pytest.raises(FileError, match="lacks group-000001; remove the groups after it"):
        EpisodeStore(tmp_path)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_store_json_is_read_or_refused_by_name(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_store(Path(folder), [3])
        path = Path(folder) / "store.json"
        path.write_text(json.dumps(data.draw(changed(json.loads(path.read_text())))))
        reason = refusal(Path(folder))
        assert reason is None or folder in reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"schema": 2}, "schema 2, and schema 1 is read"),
        ({"frame_shape": [1, 0, 2]}, "frame_shape"),
        ({"frame_skip": 0}, "frame_skip"),
        ({"actions": {"low": [0.0], "high": [], "num_actions": 0}}, "as many low as high"),
        ({"actions": {"low": [], "high": [], "num_actions": 0}}, "either bounds"),
    ],
)
def test_impossible_facts_are_refused(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    write_store(tmp_path, [3])
    path = tmp_path / "store.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(FileError, match=f"store.json.*{reason}"):
        EpisodeStore(tmp_path)


def test_store_json_is_data(tmp_path: Path) -> None:
    write_store(tmp_path, [3])
    path, mark = tmp_path / "store.json", tmp_path / "mark"
    node = {"_target_": "pathlib.Path.touch", "self": {"_target_": "pathlib.Path", "_args_": [str(mark)]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"env": node, "policy": node}))
    assert dataset(tmp_path).store.facts.env == node
    assert not mark.exists()


def test_a_folder_of_something_else_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "train" / "cats").mkdir(parents=True)
    with (
        pytest.raises(RunError, match="is no store of episodes, it holds train; give another folder"),
        writing(tmp_path, StoreFacts(frame_shape=(1, 2, 2), actions=CONTINUOUS)),
    ):
        pass
    assert not (tmp_path / "store.json").exists()


def test_few_groups_are_mapped_at_the_same_time(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(episode_store, "MAX_MAPPED", 3)
    written = write_store(tmp_path, [2] * 8, group=1)
    store = EpisodeStore(tmp_path)
    for number in (0, 1, 2, 3, 0, 7, 6, 5, 0):
        assert same(store.episode(number), written[number])
        assert sum("arrays" in group.__dict__ for group in store.groups) <= 3


def test_a_data_set_is_pickled_without_its_frames(tmp_path: Path) -> None:
    write_store(tmp_path, [40] * 4, shape=(3, 32, 32))
    windows = dataset(tmp_path)
    sample = windows[5]
    content = pickle.dumps(windows)
    assert len(content) < 20_000  # the frames have half a million bytes
    assert torch.equal(pickle.loads(content)[5].clip, sample.clip)


def test_workers_deliver_what_the_main_process_does(tmp_path: Path) -> None:
    write_store(tmp_path, [6] * 6)
    windows = dataset(tmp_path)
    windows[0]  # so that there are maps to inherit
    streams = [batches(windows, batch_size=4, seed=0, num_workers=n, fields=windows.fields) for n in (0, 2)]
    for mine, theirs in islice(zip(*streams, strict=True), 6):
        assert torch.equal(mine.pixels, theirs.pixels)
        assert all(torch.equal(mine.fields[name], theirs.fields[name]) for name in windows.fields)
    for stream in streams:
        stream.close()


def collected(folder: str, barrier: Any, results: Any) -> None:
    barrier.wait()
    env, policy = TwoRooms(), StickyRandom()
    windows = Episodes(num_frames=3, path=folder, env=env, policy=policy, episodes=130, steps=3)
    results.put((len(windows), identity(windows)["digest"]))


@pytest.mark.slow
def test_ranks_that_start_at_once_collect_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    ranks = [context.Process(target=collected, args=(str(tmp_path), barrier, results)) for _ in range(2)]
    for rank in ranks:
        rank.start()
    first, second = results.get(timeout=120), results.get(timeout=120)
    for rank in ranks:
        rank.join()
    assert first == second
    assert EpisodeStore(tmp_path).lengths.tolist() == [3] * 130
    assert sorted(path.name for path in tmp_path.glob("group-*")) == ["group-000000", "group-000001"]


def test_collecting_goes_on_where_it_was(tmp_path: Path) -> None:
    def collect_into(folder: str, number: int) -> EpisodeStore:
        env, policy = TwoRooms(), StickyRandom()
        return collect(tmp_path / folder, env=env, policy=policy, num_episodes=number, num_steps=3, seed=1)

    collect_into("a", 3)
    parts, whole = collect_into("a", 5), collect_into("b", 5)
    assert all(same(parts.episode(n), whole.episode(n)) for n in range(5))
    with pytest.raises(RunError, match="holds episodes of seed=1, and seed=2 was asked for"):
        collect(tmp_path / "a", env=TwoRooms(), policy=StickyRandom(), num_episodes=9, num_steps=3, seed=2)


class TestIdentity:
    def test_a_store_that_was_moved_is_the_same(self, tmp_path: Path) -> None:
        write_store(tmp_path / "a", [4] * 4)
        before = identity(dataset(tmp_path / "a"))
        shutil.copytree(tmp_path / "a", tmp_path / "elsewhere" / "b")
        assert changes(before, json.loads(json.dumps(identity(dataset(tmp_path / "elsewhere" / "b"))))) == []

    def test_a_store_that_grew_is_other_data_unless_the_episodes_are_limited(self, tmp_path: Path) -> None:
        write_store(tmp_path, [4] * 4)
        before = identity(dataset(tmp_path)), identity(dataset(tmp_path, episodes=3))
        append(tmp_path, [episode(4, 4)])
        assert changes(before[0], identity(dataset(tmp_path))) == ["12 samples then, 15 now"]
        assert changes(before[1], identity(dataset(tmp_path, episodes=3))) == []

    @pytest.mark.parametrize("name", ["frames", "actions", "rewards", "terminated", "states"])
    def test_other_values_are_other_data(self, tmp_path: Path, name: str) -> None:
        write_store(tmp_path, [4] * 2)
        before = identity(dataset(tmp_path))
        path = tmp_path / "group-000000" / f"{name}.npy"
        np.save(path, np.load(path)[::-1].copy())
        (change,) = changes(before, identity(dataset(tmp_path)))
        assert change.startswith("as many samples, but other contents")

    def test_a_group_that_was_written_again_has_another_version(self, tmp_path: Path) -> None:
        write_store(tmp_path, [4] * 4)
        windows = dataset(tmp_path)
        before = [windows.modified(index) for index in (0, len(windows) - 1)]
        path = tmp_path / "group-000001" / "frames.npy"
        path.write_bytes(path.read_bytes())
        after = [windows.modified(index) for index in (0, len(windows) - 1)]
        assert [a == b for a, b in pairwise([before[0], after[0]])] == [True]
        assert before[1] != after[1]


def test_an_objective_that_needs_more_is_refused_with_what_there_is(tmp_path: Path) -> None:
    write_store(tmp_path, [4])
    config: Any = SimpleNamespace(objective={"_target_": "jepa.objectives.dynamics.Dynamics"})
    with pytest.raises(
        ConfigError, match="Dynamics learns from actions, and Episodes has none; it has states, quantities"
    ):
        needed_fields(config, dataset(tmp_path, num_frames=1))


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["dataset.path=nowhere"], "dataset.path=nowhere: there is no folder"),
        (["dataset.path=."], r"store.json; .*jepa-collect writes a folder of episodes"),
        ([], "dataset.path"),
        (
            ["dataset.path=nowhere", "+dataset.env._target_=jepa.envs.two_rooms.TwoRooms"],
            "needs dataset.policy and dataset.episodes",
        ),
    ],
)
def test_a_store_that_does_not_exist_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: Any, overrides: list[str], reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=reason):
        compose(["dataset=episodes", "num_frames=1", *overrides])


@pytest.mark.slow
@pytest.mark.parametrize("objective", [[], ["objective=mae"]])
def test_an_objective_of_images_learns_from_single_frames(tmp_path: Path, objective: list[str]) -> None:
    from jepa import JEPAAgent, JEPAConfig

    write_store(tmp_path / "store", [7] * 12, shape=(1, 16, 16))
    sizes = ["image_size=16", "encoder.patch_size=4", "encoder.embed_dim=16", "encoder.depth=1", "encoder.num_heads=2"]
    predictor = [] if objective else ["predictor.width=16", "predictor.depth=1"]
    data = ["dataset=episodes", f"dataset.path={tmp_path / 'store'}", "num_frames=1", "mask=random", "batch_size=8"]
    run = ["steps=2", "num_workers=0", "logger=none", "log_every=1", "evaluator=[regression]", "precision=fp32"]
    agent = JEPAAgent(JEPAConfig(*data, *objective, *sizes, *predictor, *run), folder=tmp_path / "run")
    agent.train()
    rows = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert [row["step"] for row in rows if row.get("train/loss", 0) > 0] == [1, 2]


def test_padded_windows_show_the_end_at_every_position(tmp_path: Path) -> None:
    (written,) = write_store(tmp_path, [4])
    data = dataset(tmp_path, num_frames=4, pad=True)
    assert len(data) == 4  # one for each transition
    for first in range(4):
        clip, _, fields = data[first]
        count = min(3, 4 - first)
        kept = [*range(first, first + count + 1), *[4] * (3 - count)]
        assert np.array_equal(clip.numpy().transpose(1, 0, 2, 3), written.frames[kept])
        assert fields["valid"].tolist() == [1.0] * count + [0.0] * (3 - count)
        assert fields["rewards"].tolist() == [*written.rewards[first : first + count], *[0.0] * (3 - count)]
        assert np.array_equal(fields["actions"][:count].numpy(), written.actions[first : first + count])
        assert fields["terminated"].tolist()[:count] == written.terminated[first : first + count].tolist()


def test_padding_is_for_objectives_that_leave_it_out(tmp_path: Path) -> None:
    write_store(tmp_path, [8, 8])
    choices = ["dataset=episodes", f"dataset.path={tmp_path}", "encoder=spatial", "num_frames=3", "dataset.pad=true"]
    compose([*choices, "objective=iris"])
    with pytest.raises(ConfigError, match=r"dataset.pad=true: objective=iris alone leaves repeated frames out"):
        compose([*choices, "objective=dynamics", "predictor=action", "regularizer=vicreg"])


def test_a_store_that_has_grown_is_the_same_data(tmp_path: Path) -> None:
    write_store(tmp_path / "store", [5, 4, 6])
    before = identity(dataset(tmp_path / "store", val_ratio=0.34))
    shutil.copytree(tmp_path / "store", tmp_path / "other")
    write_store(tmp_path / "store", [7, 3])
    assert has_grown(before, dataset(tmp_path / "store", val_ratio=0.34))
    assert not has_grown(before, dataset(tmp_path / "other", val_ratio=0.34))  # as it was
    frames = np.load(tmp_path / "store" / "group-000000" / "frames.npy")
    np.save(tmp_path / "store" / "group-000000" / "frames.npy", 255 - frames)
    assert not has_grown(before, dataset(tmp_path / "store", val_ratio=0.34))
