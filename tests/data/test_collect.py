"""Collecting: episodes follow the rule of time, a killed process loses one group, and other stores are refused."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest

from jepa.data import collect as collecting
from jepa.data import episode_store
from jepa.data.collect import collect, rollouts
from jepa.data.episode_store import Episode, EpisodeStore, StoreFacts
from jepa.envs.policies import Expert, Random, StickyRandom
from jepa.envs.two_rooms import TwoRooms
from jepa.envs.types import Transition
from jepa.errors import RunError
from jepa.types import ActionSpace


class Countdown:
    """Frames show the number of steps; environment n ends after `lengths[seed]` steps and then shows 99."""

    settings = {}
    actions = ActionSpace(num_actions=2)
    frame_shape = (1, 1, 1)
    state_names = ("count",)
    group_size = 3
    lengths = {0: 2, 1: 4, 2: 9}

    def reset(self, seeds, states=None, goals=None):
        self.limits, self.count = np.array([self.lengths[seed % 3] for seed in seeds]), 0
        return self._show()

    def step(self, actions: np.ndarray) -> Transition:
        self.count += 1
        return Transition(*self._show(), np.ones(len(self.limits), np.float32), self.count == self.limits, self._no())

    def _show(self):
        shown = np.where(self.count <= self.limits, self.count, 99)
        return shown.astype(np.uint8).reshape(-1, 1, 1, 1), shown.astype(np.float32)[:, None]

    def _no(self) -> np.ndarray:
        return np.zeros(len(self.limits), dtype=bool)

    def close(self) -> None:
        pass


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fill(folder: Path, *, env=None, policy=None, num_episodes: int = 5, num_steps: int = 6, seed: int = 0):
    env = env or Countdown()
    policy = policy or Random()
    return collect(folder, env=env, policy=policy, num_episodes=num_episodes, num_steps=num_steps, seed=seed)


def test_an_episode_is_one_frame_more_than_transitions_and_stops_where_its_world_does() -> None:
    episodes = rollouts(Countdown(), Random(), [0, 1, 2], 6)
    for episode, length in zip(episodes, (2, 4, 6), strict=True):
        np.testing.assert_array_equal(episode.frames.ravel(), np.arange(length + 1))
        assert [len(array) for array in episode] == [length + 1] * 2 + [length] * 4
        np.testing.assert_array_equal(episode.terminated, [False] * (length - 1) + [length < 6])


def test_nothing_is_stepped_when_all_have_ended() -> None:
    env = Countdown()
    rollouts(env, Random(), [0, 1], 100)
    assert env.count == 4


def test_frames_of_a_store_are_those_of_the_environment(tmp_path: Path) -> None:
    store = fill(tmp_path, env=TwoRooms(channels=3), policy=StickyRandom(), num_episodes=4, num_steps=5)
    for number in range(4):
        episode = store.episode(number)
        np.testing.assert_array_equal(TwoRooms(channels=3).render(episode.states), episode.frames)
        moved = TwoRooms().simulate(episode.states[:-1], episode.actions)
        np.testing.assert_array_equal(moved, episode.states[1:])


def test_an_episode_depends_on_seed_and_number_alone(tmp_path: Path) -> None:
    few, many = fill(tmp_path / "few", num_episodes=2), fill(tmp_path / "many", num_episodes=7)
    for number in range(2):
        for a, b in zip(few.episode(number), many.episode(number), strict=True):
            np.testing.assert_array_equal(a, b)
    other = fill(tmp_path / "other", num_episodes=7, seed=1)
    assert contents(many.folder)["group-000000/actions.npy"] != contents(other.folder)["group-000000/actions.npy"]


def test_the_same_call_again_changes_nothing_and_more_episodes_are_added(tmp_path: Path) -> None:
    fill(tmp_path)
    before = contents(tmp_path)
    fill(tmp_path)
    assert contents(tmp_path) == before
    assert len(fill(tmp_path, num_episodes=9)) == 9
    assert before.items() <= contents(tmp_path).items()


@pytest.mark.parametrize("moment", range(1, 20, 3))
def test_a_process_that_is_killed_loses_one_group_and_the_store_ends_the_same(
    moment: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = fill(tmp_path / "whole")
    child = os.fork()
    if child == 0:
        writes, save = [], np.save

        def killing_save(*arguments) -> None:
            writes.append(save(*arguments))
            if len(writes) == moment:
                os.kill(os.getpid(), signal.SIGKILL)

        episode_store.np.save = killing_save
        fill(tmp_path / "killed")
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) == (moment <= 14)  # two groups of seven files
    if moment <= 14:
        assert len(EpisodeStore(tmp_path / "killed")) == (0 if moment <= 7 else 3)
    store = fill(tmp_path / "killed")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    np.testing.assert_array_equal(store.lengths, expected.lengths)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"seed": 1}, r"seed=0, and seed=1"),
        ({"num_steps": 7}, r"steps=6, and steps=7"),
        ({"policy": StickyRandom(keep=0.5)}, r"policies\.Random, and .*StickyRandom, policy\.keep=0\.5"),
        ({"env": TwoRooms()}, r"Countdown.*TwoRooms"),
    ],
)
def test_episodes_of_other_origin_are_refused_with_both_values(tmp_path: Path, change, expected: str) -> None:
    fill(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(RunError, match=expected):
        fill(tmp_path, **change)
    assert contents(tmp_path) == before


def test_a_store_without_episodes_takes_any(tmp_path: Path) -> None:
    StoreFacts(frame_shape=(1, 1, 1), actions=ActionSpace(num_actions=2), seed=5).write(tmp_path)
    assert len(fill(tmp_path)) == 5


def test_a_folder_with_something_else_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(RunError, match=r"thesis\.txt"):
        fill(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} <= {"thesis.txt", ".lock"}


def test_a_path_that_cannot_be_written_is_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        fill(tmp_path / "file")


def test_expert_episodes_end_at_their_goals(tmp_path: Path) -> None:
    store = fill(tmp_path, env=TwoRooms(), policy=Expert(), num_episodes=20, num_steps=60)
    ends = [store.episode(number) for number in range(20)]
    assert all(episode.terminated.tolist() == [False] * (len(episode.terminated) - 1) + [True] for episode in ends)
    assert all(episode.rewards.sum() == 1 for episode in ends)


def test_a_world_of_another_project_goes_through(tmp_path: Path) -> None:
    tiny_jepa = pytest.importorskip("tiny_jepa")
    from orby import Orby

    store = fill(tmp_path, env=Orby(), policy=Random(), num_episodes=3, num_steps=12)
    assert store.facts.actions.num_actions == 5
    for number in range(3):
        episode = Episode(**store.read(number))
        assert episode.frames.shape == (13, 1, 32, 32)
        world, replayed = tiny_jepa.OrbyWorld(), []
        world.agent = episode.states[0, :2].astype(float)
        for action, after in zip(episode.actions, episode.states[1:], strict=True):
            world.pellet = after[2:].astype(float) + 100  # out of reach: only the agent is followed
            world.step(action)
            replayed.append(world.agent.copy())
        np.testing.assert_allclose(replayed, episode.states[1:, :2], atol=1e-4)
        brightest = episode.frames[:, 0].reshape(13, -1).max(axis=1)
        assert (brightest > 200).all()


def test_a_group_of_long_episodes_is_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collecting, "GROUP_BYTES", 14)  # two episodes of seven frames of one byte
    store = fill(tmp_path, num_episodes=5)
    assert [len(group.lengths) for group in store.groups] == [2, 2, 1]
