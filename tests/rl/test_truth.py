"""Figures of what a dream gets right: closed forms, and the verdict on runs that only look good."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stored_episodes import DISCRETE, write_store

from jepa.data.episode_store import Episode, EpisodeStore
from jepa.rl.dreams import DreamWorld, StepOutcome
from jepa.rl.replay import remember
from jepa.rl.report import verdict
from jepa.rl.truth import doubts, own_rewards, truth


class Told(DreamWorld):
    """Frames as they are, of kind long for tokens; a step adds `error` to some frames and expects given rewards."""

    context = 1

    def __init__(self, dtype: torch.dtype, wrong: Sequence[int] = (), rewards: Sequence[float] = ()) -> None:
        super().__init__()
        self.dtype, self.wrong, self.rewards = dtype, list(wrong), rewards

    @property
    def actions(self) -> Any:
        return DISCRETE

    def encode(self, frames: Any) -> torch.Tensor:
        return torch.as_tensor(np.array(frames)).flatten(1).to(self.dtype)

    def dream(self, encoded: torch.Tensor, actions: torch.Tensor, random: Any) -> Any:
        self.begun = encoded[:, -1].clone()
        return self

    def step(self, actions: torch.Tensor) -> StepOutcome:
        after = self.begun.clone()
        after[:, 2:] += 1  # the lower half of a frame is its time
        after[self.wrong, 2:] += 1
        return StepOutcome(after, torch.tensor(self.rewards), torch.ones(len(after)))


def figures(folder: Path, world: Told, lengths: Sequence[int] = (3, 3)) -> dict[str, float]:
    store = EpisodeStore(folder)
    numbers = range(len(lengths))
    return truth(world, store, numbers, remember(world, store, numbers, torch.device("cpu")))


@pytest.mark.parametrize("dtype", [torch.long, torch.float32])
def test_a_frame_is_exact_if_it_is_the_right_one(dtype: torch.dtype, tmp_path: Path) -> None:
    write_store(tmp_path, [3, 3], actions=DISCRETE)
    rewards = [0.0, 1, 2, 100, 101, 102]  # those of the store
    told = figures(tmp_path, Told(dtype, rewards=rewards))
    assert told["exact_frames"] == 1
    assert told["reward_error"] == 0
    assert told["reward_recall"] == 1
    assert told["false_rewards"] == 0
    assert figures(tmp_path, Told(dtype, wrong=[1, 3], rewards=rewards))["exact_frames"] == pytest.approx(4 / 6)


def test_rewards_that_are_missed_or_invented_are_counted(tmp_path: Path) -> None:
    write_store(tmp_path, [3, 3], actions=DISCRETE)
    told = figures(tmp_path, Told(torch.long, rewards=[40.0, 0.4, 1.1, 100, 0, -102]))
    assert told["reward_recall"] == pytest.approx(2 / 5)  # half of 1 is not reached, and 102 has the wrong sign
    assert told["false_rewards"] == 1  # the only step without a reward promises two thirds of the usual one
    assert figures(tmp_path, Told(torch.long, rewards=[20.0, 1, 2, 100, 101, 102]))["false_rewards"] == 0


def test_frames_that_share_their_tokens_are_counted(tmp_path: Path) -> None:
    write_store(tmp_path, [3, 3], actions=DISCRETE)

    class Blind(Told):
        def encode(self, frames: Any) -> torch.Tensor:
            return super().encode(frames) // 2  # times 0 and 1, 2 and 3 look alike, and so do the two episodes

    assert figures(tmp_path, Blind(torch.long, rewards=[0.0] * 6))["distinct"] == pytest.approx(2 / 8)
    assert figures(tmp_path, Told(torch.long, rewards=[0.0] * 6))["distinct"] == 1


def test_rewards_of_the_policys_episodes_are_compared_with_what_single_steps_expect(tmp_path: Path) -> None:
    write_store(tmp_path, [3, 3], actions=DISCRETE)  # their rewards are 0, 1, 2 and 100, 101, 102
    store = EpisodeStore(tmp_path)
    episodes = [Episode(**store.read(number)) for number in range(2)]
    device = torch.device("cpu")
    all_of_them = Told(torch.float32, rewards=[7.0, 1, 2, 100, 101, 102])  # what is expected for nothing does not count
    assert own_rewards(all_of_them, episodes, device) == {"reward_size": pytest.approx(1)}
    thirds = Told(torch.float32, rewards=[0.0, 0, 0, 34, 34, 34])
    assert own_rewards(thirds, episodes, device) == {"reward_size": pytest.approx(1 / 3)}
    nothing = [one._replace(rewards=0 * one.rewards) for one in episodes]
    assert own_rewards(all_of_them, nothing, device) == {}


def test_enough_of_the_policys_episodes_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_store(tmp_path, [3, 3, 3], actions=DISCRETE)
    store = EpisodeStore(tmp_path)
    episodes = [Episode(**store.read(number)) for number in range(3)]
    monkeypatch.setattr("jepa.rl.truth.MAX_FRAMES", 4)
    first_four = Told(torch.float32, rewards=[0.0, 1, 2, 50])  # of 100, in the second episode
    assert own_rewards(first_four, episodes, torch.device("cpu")) == {"reward_size": pytest.approx(53 / 103)}


SHORTER = "a smaller horizon leaves the policy fewer errors of the world to find"
GOOD = {
    "distinct": 1.0, "false_rewards": 0.0, "reward_recall": 1.0, "exact_frames": 1.0, "imagined_return": 0.9,
    "real_return": 0.95,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, ""),
        ({"distinct": 0.9}, "only 90.0% of different frames have different tokens"),
        ({"false_rewards": 0.1}, "10.0% of the steps without a reward promise one"),
        ({"reward_recall": 0.3}, "30% of the rewards are expected"),
        ({"imagined_return": 0.8, "real_return": 0.3}, f"dreams return 0.8, episodes 0.3 ({SHORTER})"),
        (
            {"imagined_return": 0.3, "real_return": 0.9, "reward_size": 0.32},
            "dreams return 0.3, episodes 0.9 (single steps expect 32% of the rewards that the policy's episodes "
            "brought: few like them were collected, or they depend on what frames do not show, as the time)",
        ),
        (
            {"imagined_return": 0.8, "real_return": 0.3, "reward_size": 0.4},
            f"dreams return 0.8, episodes 0.3 ({SHORTER})",
        ),
        ({"imagined_return": -0.2, "real_return": 0.9}, "dreams return -0.2, episodes 0.9"),
    ],
)
def test_a_run_says_why_its_imagined_return_is_not_to_be_trusted(change: dict[str, float], reason: str) -> None:
    reasons = doubts(GOOD | change)
    assert reasons == ([reason] if reason else [])
    text = verdict({**GOOD, **change, "doubts": reasons})
    assert text.startswith("not to be trusted: " if reason else "trustworthy")
    assert reason in text
