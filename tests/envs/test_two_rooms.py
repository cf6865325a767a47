"""Two Rooms: no wall is crossed, paths and expert are shortest, and gymnasium accepts it."""

from __future__ import annotations

import heapq

import numpy as np
import pytest

from jepa.envs.policies import StickyRandom
from jepa.envs.two_rooms import (
    DOOR,
    DOORS,
    HALF_DOOR,
    HALF_WALL,
    MARGIN,
    MAX_STEP,
    SIDE,
    WALL,
    WALLS,
    TwoRooms,
    is_blocked,
)


@pytest.mark.parametrize("walls", ["fixed", "random"])
def test_no_wall_is_crossed_in_100_000_random_steps(walls) -> None:
    env, policy, seeds = TwoRooms(walls=walls), StickyRandom(), range(1000)
    states = env.reset(seeds)[1]
    policy.begin(env.actions, seeds, 100)
    for step in range(100):
        before, states = states, env.simulate(states, policy.act(step, np.empty(0), states))
        assert not is_blocked(states).any()
        crosses = (before[:, 0] - before[:, WALL]) * (states[:, 0] - states[:, WALL]) < 0
        ends = np.stack([before[crosses], states[crosses]])  # no step is longer than the wall is thick
        across, down = np.abs(ends[..., 0] - ends[..., WALL]), np.abs(ends[..., 1] - ends[..., DOOR])
        assert ((across <= HALF_WALL) & (down <= HALF_DOOR)).any(axis=0).all()


def test_the_longest_step_does_not_jump_the_wall_wherever_it_starts() -> None:
    env = TwoRooms()
    y = np.arange(MARGIN, SIDE / 2 - HALF_DOOR, 0.5, dtype=np.float32)
    starts = np.stack([np.full_like(y, SIDE / 2 - HALF_WALL), y, *[np.full_like(y, SIDE / 2)] * 2], axis=1)
    moved = env.simulate(starts, np.tile(np.float32([MAX_STEP, 0]), (len(y), 1)))
    assert (moved[:, 0] <= SIDE / 2 - HALF_WALL).all()


def test_a_dot_slides_along_a_wall() -> None:
    env = TwoRooms()
    start = np.float32([[SIDE / 2 - HALF_WALL, 10, SIDE / 2, SIDE / 2]])
    moved = env.simulate(start, np.float32([[MAX_STEP, MAX_STEP]]))
    np.testing.assert_allclose(moved[0, :2], [SIDE / 2 - HALF_WALL, 10 + MAX_STEP])


def test_layouts_are_fixed_or_differ_between_seeds() -> None:
    layouts = {
        walls: np.stack([TwoRooms(walls=walls).sample(seed)[2:] for seed in range(50)]) for walls in ("fixed", "random")
    }
    assert (layouts["fixed"] == SIDE / 2).all()
    assert len(np.unique(layouts["random"], axis=0)) == 50
    low, high = zip(WALLS, DOORS, strict=True)
    assert ((layouts["random"] >= low) & (layouts["random"] <= high)).all()


def test_start_and_goal_are_in_different_rooms_of_one_layout() -> None:
    env = TwoRooms(walls="random")
    for start, goal in map(env.task, range(100)):
        assert (start[0] - start[WALL]) * (goal[0] - goal[WALL]) < 0
        np.testing.assert_array_equal(start[2:], goal[2:])
        assert not is_blocked(np.stack([start, goal])).any()


def grid_length(start: np.ndarray, goal: np.ndarray, spacing: float = 1.0) -> float:
    """Dijkstra's shortest path over points `spacing` apart, with moves to all points within three."""
    size = int(SIDE / spacing)
    points = np.stack(np.meshgrid(*[np.arange(size)] * 2, indexing="ij"), axis=-1).reshape(-1, 2) * spacing
    layout = np.tile(start[2:], (len(points), 1))
    is_free = ~is_blocked(np.concatenate([points, layout], axis=1)).reshape(size, size)
    moves = [(i, j) for i in range(-3, 4) for j in range(-3, 4) if np.gcd(i, j) == 1]
    first, last = (tuple(int(x) for x in np.round(state[:2] / spacing)) for state in (start, goal))
    lengths, queue = {first: 0.0}, [(0.0, first)]
    while queue:
        length, (x, y) = heapq.heappop(queue)
        if (x, y) == last:
            return length * spacing
        for i, j in moves:
            to = (x + i, y + j)
            longer = length + float(np.hypot(i, j))
            inside = 0 <= to[0] < size and 0 <= to[1] < size
            if inside and is_free[to] and longer < lengths.get(to, np.inf):
                lengths[to] = longer
                heapq.heappush(queue, (longer, to))
    raise AssertionError("there is no path")


@pytest.mark.parametrize("seed", range(4))
def test_the_path_is_as_long_as_the_shortest_of_a_fine_grid(seed: int) -> None:
    env = TwoRooms(walls="random")
    start, goal = env.task(seed)
    assert env.path_length(start[None], goal[None])[0] == pytest.approx(grid_length(start, goal), rel=0.03, abs=1.5)


def test_the_path_within_a_room_is_straight_and_the_same_both_ways() -> None:
    env = TwoRooms()
    states, goals = (np.stack([env.sample(seed) for seed in seeds]) for seeds in (range(200), range(200, 400)))
    same = (states[:, 0] < SIDE / 2) == (goals[:, 0] < SIDE / 2)
    lengths = env.path_length(states, goals)
    np.testing.assert_allclose(lengths[same], env.distance(states, goals)[same], rtol=1e-5)
    np.testing.assert_allclose(lengths, env.path_length(goals, states), atol=1e-2)
    assert (lengths >= env.distance(states, goals) - 1e-3).all()


@pytest.mark.parametrize("walls", ["fixed", "random"])
def test_the_expert_reaches_every_goal_in_the_steps_of_the_path_and_one_for_each_corner(walls) -> None:
    env = TwoRooms(walls=walls)
    starts, goals = map(np.stack, zip(*map(env.task, range(300)), strict=True))
    states = env.reset(range(300), starts, goals)[1]
    lengths, steps = env.path_length(starts, goals), np.zeros(300)
    for _ in range(60):
        steps += ~env.has_ended
        states = env.step(env.expert(states, goals)).states
    assert env.has_ended.all()
    assert (steps <= np.ceil(lengths / MAX_STEP) + 2).all()


def test_an_environment_that_has_ended_stays_and_is_rewarded_once() -> None:
    env = TwoRooms()
    state = env.sample(0)[None]
    env.reset([0], state, state)
    first, second = (env.step(np.float32([[1, 1]])) for _ in range(2))
    assert (first.rewards[0], second.rewards[0]) == (1, 0)
    assert first.terminated[0]
    assert not second.terminated[0]
    np.testing.assert_array_equal(first.frames, second.frames)


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ([[32, 10, 32, 32]], "inside a wall"),
        ([[1, 10, 32, 32]], "inside a wall"),
        ([[10, 10]], "expected (1, 4)"),
        ([[np.nan, 10, 32, 32]], "finite"),
    ],
)
def test_impossible_states_are_refused(states, expected: str) -> None:
    for name in ("states", "goals"):
        with pytest.raises(ValueError, match=expected.replace("(", r"\(").replace(")", r"\)")):
            TwoRooms().reset([0], **{name: np.array(states)})


def test_gymnasium_accepts_the_registered_environment() -> None:
    gymnasium = pytest.importorskip("gymnasium")
    from gymnasium.utils.env_checker import check_env

    import jepa.envs.registered  # noqa: F401

    for walls in ("fixed", "random"):
        env = gymnasium.make("jepa/TwoRooms-v0", walls=walls, render_mode="rgb_array")
        with pytest.warns(UserWarning, match="normalized"):
            check_env(env.unwrapped)


def test_the_registered_environment_takes_start_and_goal_and_tells_both() -> None:
    gymnasium = pytest.importorskip("gymnasium")
    import jepa.envs.registered  # noqa: F401

    env = gymnasium.make("jepa/TwoRooms-v0")
    rooms = TwoRooms(channels=3)
    start, goal = rooms.task(5)
    frame, info = env.reset(seed=0, options={"state": start, "goal_state": goal})
    np.testing.assert_array_equal(info["state"], start)
    np.testing.assert_array_equal(info["goal_state"], goal)
    np.testing.assert_array_equal(frame, rooms.render(start[None])[0].transpose(1, 2, 0))
    np.testing.assert_array_equal(info["goal"], rooms.render(goal[None])[0].transpose(1, 2, 0))
    assert info["distance"] == pytest.approx(rooms.distance(start[None], goal[None])[0])
    assert not info["success"]
    for _ in range(60):
        _, reward, terminated, _, info = env.step(rooms.expert(info["state"][None], goal[None])[0])
        if terminated:
            break
    assert (reward, terminated, info["success"]) == (1, True, True)
    with pytest.raises(ValueError, match="goal_state"):
        env.reset(options={"goal": goal})
