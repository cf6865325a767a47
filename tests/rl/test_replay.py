"""The replay: exactly so many steps, the same after a kill, windows that stay in their episode, nothing forgotten."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from corridor import Corridor
from stored_episodes import DISCRETE, episode, same, write_store

from jepa.data.episode_store import EpisodeStore
from jepa.envs.policies import Random
from jepa.rl.dreams import DreamWorld
from jepa.rl.replay import cut, extend, remember
from jepa.types import ActionSpace


class Seen(DreamWorld):
    """Encodes a frame as its first and its last pixel: number of the episode, number of the frame."""

    def __init__(self, space: ActionSpace = DISCRETE) -> None:
        super().__init__()
        self.space = space

    @property
    def actions(self) -> ActionSpace:
        return self.space

    def encode(self, frames: Any) -> torch.Tensor:
        frames = torch.as_tensor(np.array(frames))
        return torch.stack([frames[:, 0, 0, 0], frames[:, 0, -1, 0]], dim=1).float()


def collect(folder: Path, num_steps: int) -> EpisodeStore:
    return extend(folder, env=Corridor(), policy=Random, num_steps=num_steps, episode_steps=9, seed=3)


def test_the_store_has_exactly_the_steps_that_were_asked_for(tmp_path: Path) -> None:
    for num_steps in (1, 40, 41, 333):
        assert collect(tmp_path, num_steps).lengths.sum() == num_steps


def test_a_killed_collection_goes_on_to_the_same_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = collect(tmp_path / "whole", 400)
    steps = Corridor.step
    for limit in (3, 12, 4):
        left = iter(range(limit))

        def killed(self: Corridor, actions: np.ndarray, left: Any = left) -> Any:
            if next(left, None) is None:
                raise KeyboardInterrupt
            return steps(self, actions)

        monkeypatch.setattr(Corridor, "step", killed)
        with pytest.raises(KeyboardInterrupt):
            collect(tmp_path / "killed", 400)
    monkeypatch.undo()
    again = collect(tmp_path / "killed", 400)
    assert len(again) == len(whole)
    assert all(same(again.episode(n), whole.episode(n)) for n in range(len(whole)))


def test_what_was_experienced_first_stays(tmp_path: Path) -> None:
    before = [collect(tmp_path, 100).episode(n) for n in range(len(collect(tmp_path, 100)))]
    after = collect(tmp_path, 300)
    assert all(same(after.episode(n), one) for n, one in enumerate(before[:-1]))


def test_the_last_episode_is_cut_where_the_steps_are_used_up() -> None:
    kept = cut([episode(0, 4), episode(1, 5), episode(2, 6)], 7)
    assert [len(one.actions) for one in kept] == [4, 3]
    assert [len(one.frames) for one in kept] == [5, 4]
    assert not kept[1].terminated.any()
    assert not kept[1].truncated.any()


def test_windows_stay_in_their_episode_and_pair_each_frame_with_the_action_after_it(tmp_path: Path) -> None:
    lengths = [3, 1, 4]
    write_store(tmp_path, lengths, actions=DISCRETE)
    store = EpisodeStore(tmp_path)
    memory = remember(Seen(), store, range(3), torch.device("cpu"))
    assert len(memory.starts) == sum(lengths)  # no dream begins with the last frame of an episode
    for count in (1, 2, 3):
        seen, actions = memory.windows(memory.starts, count)
        for row, (numbers, times) in enumerate(zip(seen[..., 0].tolist(), seen[..., 1].tolist(), strict=True)):
            number, last = int(numbers[-1]), int(times[-1])
            assert set(numbers) == {number}
            assert times == [max(0, last - count + 1 + k) for k in range(count)]
            places = [last - count + 1 + k for k in range(count - 1)]
            assert actions[row].tolist() == [(number + place) % 5 if place >= 0 else 0 for place in places]
            assert memory.actions[memory.starts[row]] == (number + last) % 5


def test_frames_come_back_as_they_were_seen(tmp_path: Path) -> None:
    env = Corridor()
    store = collect(tmp_path, 60)
    for number in range(len(store)):
        one = store.episode(number)
        env.cells = one.states[:, 0].astype(int)
        assert np.array_equal(env.frames(), one.frames)
        moves = np.diff(one.states[:, 0])
        assert all(move in ({0: -1, 1: 1, 2: 0}[action], 0) for move, action in zip(moves, one.actions, strict=True))
