"""Figures of plannability against worlds whose true values are known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from stored_episodes import write_store
from tiny_world import make_world
from torch import Tensor

from jepa.data.episode_store import Episode, StoreFacts, append, writing
from jepa.data.episodes import Episodes
from jepa.envs.types import Task
from jepa.planning import plannability as module
from jepa.planning.costs import LatentL2
from jepa.planning.fit import record
from jepa.planning.plannability import plannability, verdict, windows
from jepa.types import ActionSpace

SPACE = ActionSpace(low=(-4.0, -4.0), high=(4.0, 4.0))
CHOICES = ActionSpace(num_actions=3)
MOVES = np.array([[-3.0, 0.0], [0.0, 2.0], [3.0, 1.0]], dtype=np.float32)
"""Of the discrete actions."""


class Plane:
    """A point whose coordinates are the first two pixels of a frame, and a world that knows how actions move it."""

    history = 1
    heads: Mapping[str, Any] = {}

    def __init__(self, space: ActionSpace, *, knows_actions: bool = True) -> None:
        self.contract, self.knows_actions = SimpleNamespace(actions=space, block=1), knows_actions

    def encode(self, frames: Tensor | np.ndarray) -> Tensor:
        return torch.as_tensor(np.array(frames))[..., 0, :1, :2].float()

    def step(self, states: Tensor, actions: Tensor) -> Tensor:
        moves = torch.from_numpy(MOVES)[actions.long()] if actions.ndim == 2 else actions
        return states[:, -1] + (moves[:, -1:] if self.knows_actions else 1.0)

    def rollout(self, states: Tensor, actions: Tensor) -> Tensor:
        steps = []
        for step in range(actions.shape[1]):
            states = self.step(states, actions[:, step : step + 1])[:, None]
            steps.append(states[:, 0])
        return torch.stack(steps, dim=1)


def draw(states: np.ndarray) -> np.ndarray:
    frames = np.zeros((len(states), 1, 2, 2), dtype=np.uint8)
    frames[:, 0, 0] = states
    return frames


def walks(folder: Path, space: ActionSpace, number: int = 20, steps: int = 14) -> Episodes:
    """Episodes of whole steps, which frames of whole pixels show exactly; the last half is held out."""
    random = np.random.default_rng(0)
    with writing(folder, StoreFacts(frame_shape=(1, 2, 2), actions=space, state_names=("x", "y"))):
        episodes = []
        for _ in range(number):
            if space.is_discrete:
                actions = random.integers(3, size=steps)
                moves = MOVES[actions]
            else:
                moves = actions = random.integers(-4, 5, (steps, 2)).astype(np.float32)
            states = 100 + np.concatenate([np.zeros((1, 2)), np.cumsum(moves, axis=0)]).astype(np.float32)
            nothing, ends = np.zeros(steps, dtype=np.float32), np.zeros(steps, dtype=bool)
            episodes.append(Episode(draw(states), states, actions, nothing, ends, ends))
        append(folder, episodes)
    return Episodes(num_frames=3, path=str(folder), val_ratio=0.5)


class Field:
    """Tasks on the plane: the way is straight."""

    def task(self, seed: int) -> Task:
        return Task(*np.random.default_rng(seed).integers(0, 200, (2, 2)).astype(np.float32))

    def path_length(self, states: np.ndarray, goals: np.ndarray) -> np.ndarray:
        return np.linalg.norm(states - goals, axis=1)

    def render(self, states: np.ndarray) -> np.ndarray:
        return draw(states)


class Nearness(LatentL2):
    def __call__(self, world: Any, imagined: Any) -> Tensor:
        return -super().__call__(world, imagined)


class Indifference(LatentL2):
    def __call__(self, world: Any, imagined: Any) -> Tensor:
        return torch.zeros_like(super().__call__(world, imagined))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "NUM_PAIRS", 100)
    monkeypatch.setattr(module, "NUM_WINDOWS", 50)


@pytest.mark.parametrize("space", [SPACE, CHOICES], ids=["continuous", "discrete"])
def test_a_perfect_world_has_no_error_and_ranks_true_actions_first(space: ActionSpace, tmp_path: Path) -> None:
    figures = plannability(Plane(space), {}, object(), walks(tmp_path, space))  # pyright: ignore
    assert [figures[f"rollout_h{horizon}"] for horizon in (1, 5, 10)] == [0, 0, 0]
    assert figures["shuffled_ratio"] > 1e6
    equal = 1 / 3 if space.is_discrete else 0  # random choices that are the true one count half
    assert figures["true_action_rank"] == pytest.approx(1 - equal / 2, abs=0.03)


@pytest.mark.parametrize("space", [SPACE, CHOICES], ids=["continuous", "discrete"])
def test_a_world_without_actions_has_ratio_one_and_the_rank_of_chance(space: ActionSpace, tmp_path: Path) -> None:
    world = Plane(space, knows_actions=False)
    figures = plannability(world, {}, object(), walks(tmp_path, space))  # pyright: ignore
    assert figures["shuffled_ratio"] == 1
    assert figures["true_action_rank"] == 0.5
    assert "actions hardly change" in verdict(figures)


@pytest.mark.parametrize(("cost", "expected"), [(LatentL2(), 1), (Nearness(), -1)])
def test_a_cost_that_grows_with_the_way_has_correlation_one_and_its_opposite_minus_one(
    cost: Any, expected: float
) -> None:
    figures = plannability(Plane(SPACE), {"cost": cost}, Field(), None)  # pyright: ignore
    assert figures == {"cost_correlation": pytest.approx(expected)}


def test_a_cost_that_is_the_same_everywhere_has_correlation_zero() -> None:
    figures = plannability(Plane(SPACE), {"cost": Indifference()}, Field(), None)  # pyright: ignore
    assert figures == {"cost_correlation": 0}


def test_a_probe_that_reads_everything_has_r2_one_and_one_that_reads_the_mean_zero(tmp_path: Path) -> None:
    world, data = Plane(SPACE), walks(tmp_path, SPACE)
    world.heads = {"probe": lambda states: states}
    assert plannability(world, {}, object(), data)["state_r2"] == 1  # pyright: ignore
    mean = torch.from_numpy(np.concatenate([windows(data, 1, 1, 10)[2].numpy()])).mean(dim=(0, 1))
    world.heads = {"probe": lambda states: mean.expand_as(states)}
    assert plannability(world, {}, object(), data)["state_r2"] == pytest.approx(0, abs=0.01)  # pyright: ignore


def test_windows_are_of_held_out_episodes_and_of_all_if_there_are_none(tmp_path: Path) -> None:
    write_store(tmp_path, [12] * 10)
    for ratio, expected in ((0.3, {7, 8, 9}), (0.0, set(range(10)))):
        frames, actions, _ = windows(Episodes(num_frames=3, path=str(tmp_path), val_ratio=ratio), 1, 1, 5)
        assert set(frames[:, 0, 0, 0, 0]) == expected
        assert (frames.shape[1], actions.shape[1]) == (6, 5)


def test_heads_do_not_see_held_out_episodes(tmp_path: Path) -> None:
    write_store(tmp_path, [3] * 5, shape=(1, 16, 16))
    data = Episodes(num_frames=3, path=str(tmp_path), val_ratio=0.4)
    world = make_world(side=16)
    world.contract = replace(world.contract, actions=data.store.facts.actions)
    recorded = record(world, data.store, num_episodes=len(data.numbers))
    assert set(recorded.simulator[:, 0].tolist()) == {0, 1, 2}


def test_a_world_without_goals_is_not_said_to_lead_to_one() -> None:
    measured = {"shuffled_ratio": 2.0, "rollout_h5": 0.5}
    assert "goal" not in verdict(measured)
    assert "the cost falls along the way to the goal" in verdict(measured | {"cost_correlation": 0.9})
