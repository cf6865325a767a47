"""MiniGrid-Empty: shortest paths in actions, and the expert that follows them."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

pytest.importorskip("minigrid")

from jepa.envs.gym import GymEnv
from jepa.envs.minigrid import EmptyGrid


@pytest.fixture(scope="module")
def env() -> EmptyGrid:
    return EmptyGrid(id="MiniGrid-Empty-5x5-v0", size=20)


@pytest.fixture(scope="module")
def states(env: EmptyGrid) -> np.ndarray:
    """All of them."""
    return np.array(list(product(range(1, 4), range(1, 4), range(4))), dtype=np.float32)


def test_every_state_has_a_frame_of_its_own(env: EmptyGrid, states: np.ndarray) -> None:
    frames = env.render(states)
    assert len(np.unique(frames.reshape(len(frames), -1), axis=0)) == len(states) == 36


@pytest.mark.parametrize("goal", [(3, 3, 0), (2, 1, 0)])
def test_paths_are_as_long_as_those_of_a_breadth_first_search(env: EmptyGrid, states: np.ndarray, goal) -> None:
    goals = np.tile(np.float32(goal), (len(states), 1))
    moves = np.stack([env.simulate(states, np.full(len(states), action)) for action in range(3)], axis=1)
    index = {tuple(state): number for number, state in enumerate(states)}
    lengths = np.where(env.distance(states, goals) == 0, 0, 99)
    for _ in range(12):
        after = [[lengths[index[tuple(state)]] for state in row] for row in moves]
        lengths = np.minimum(lengths, 1 + np.min(after, axis=1))
    np.testing.assert_array_equal(env.path_length(states, goals), lengths)


def test_the_expert_needs_as_many_actions_as_the_path_has_and_is_rewarded_there(
    env: EmptyGrid, states: np.ndarray
) -> None:
    starts = states[(states[:, :2] != 3).any(axis=1)]
    goals = np.tile(np.float32([3, 3, 0]), (len(starts), 1))
    known = env.reset(range(len(starts)), starts, goals)[1]
    steps, returns = np.zeros((2, len(starts)))
    for _ in range(10):
        steps += ~env.has_ended
        after = env.step(env.expert(known, goals))
        known, returns = after.states, returns + after.rewards
    np.testing.assert_array_equal(steps, env.path_length(starts, goals))
    assert env.has_ended.all()
    assert (returns > 0).all()


@pytest.mark.parametrize(
    ("argument", "value", "expected"),
    [
        ("states", [0, 1, 0], "from 1 to"),
        ("states", [1, 1, 4], "from 1 to"),
        ("states", [1.5, 1, 0], "whole numbers"),
        ("goals", [1, 1, 0], "green square"),
    ],
)
def test_states_outside_and_other_goals_are_refused(env: EmptyGrid, argument: str, value, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        env.reset([0], **{argument: np.array([value])})


def test_other_layouts_have_no_tasks() -> None:
    with pytest.raises(ValueError, match="choose env=gym"):
        EmptyGrid(id="MiniGrid-DoorKey-5x5-v0")
    doors = GymEnv(id="MiniGrid-DoorKey-5x5-v0")
    assert doors.state_names == ("position/x", "position/y", "direction")
    assert not hasattr(doors, "task")
