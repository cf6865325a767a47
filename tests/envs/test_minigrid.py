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


@pytest.mark.parametrize("goal", [(3, 3, 0), (3, 3, 1), (2, 1, 0)])
def test_paths_are_as_long_as_those_of_a_breadth_first_search(env: EmptyGrid, states: np.ndarray, goal) -> None:
    goals = np.tile(np.float32(goal), (len(states), 1))
    moves = np.stack([env.simulate(states, np.full(len(states), action)) for action in range(3)], axis=1)
    index = {tuple(state): number for number, state in enumerate(states)}
    lengths = np.where((states == goals).all(axis=1), 0, np.inf)
    for _ in range(20):
        after = [[lengths[index[tuple(state)]] for state in row] for row in moves]
        lengths = np.minimum(lengths, 1 + np.min(after, axis=1))
    np.testing.assert_array_equal(env.path_length(states, goals), lengths)


@pytest.mark.parametrize("direction", [0, 1])
def test_the_expert_needs_as_many_actions_as_the_path_has_and_is_rewarded_there(
    env: EmptyGrid, states: np.ndarray, direction: int
) -> None:
    starts = states[(states[:, :2] != 3).any(axis=1)]
    goals = np.tile(np.float32([3, 3, direction]), (len(starts), 1))
    known = env.reset(range(len(starts)), starts, goals)[1]
    steps, returns = np.zeros((2, len(starts)))
    for _ in range(10):
        steps += ~env.has_ended
        after = env.step(env.expert(known, goals))
        known, returns = after.states, returns + after.rewards
    np.testing.assert_array_equal(steps, env.path_length(starts, goals))
    assert env.has_ended.all()
    assert (returns > 0).all()


def test_the_green_square_ends_an_episode_so_that_no_way_leads_through_it(env: EmptyGrid) -> None:
    facing_right, facing_down = np.float32([[3, 3, 0]]), np.float32([[3, 3, 1]])
    for action in range(3):
        np.testing.assert_array_equal(env.simulate(facing_right, np.array([action])), facing_right)
    assert env.path_length(facing_right, facing_down) == np.inf
    above = np.float32([[3, 2, 1]])
    assert env.path_length(above, facing_down) == 1
    assert env.path_length(above, facing_right) == 6  # right, walk, left, walk, left, walk


def test_a_task_s_goal_has_the_direction_of_a_shortest_way(env: EmptyGrid) -> None:
    tasks = [env.task(seed) for seed in range(40)]
    starts, goals = (np.stack(values) for values in zip(*tasks, strict=True))
    assert set(goals[:, 2]) == {0, 1}
    others = [np.where([0, 0, 1], direction, goals) for direction in range(4)]
    shortest = np.min([env.path_length(starts, other) for other in others], axis=0)
    np.testing.assert_array_equal(env.path_length(starts, goals), shortest)


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
