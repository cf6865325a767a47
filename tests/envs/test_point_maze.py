"""The point maze: shortest paths around walls, and the expert that follows them."""

from __future__ import annotations

import heapq
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest

from jepa.envs.maze_paths import MazePaths
from jepa.envs.point_maze import STRICT, TWO_ROOMS, PointMaze, _walls

SNAKE = ("#######", "#.....#", "#####.#", "#.....#", "#.#####", "#.....#", "#######")
PILLARS = ("########", "#......#", "#.#..#.#", "#...#..#", "#......#", "########")


def grid_length(paths: MazePaths, start: np.ndarray, goal: np.ndarray, spacing: float = 0.1) -> float:
    """Dijkstra's shortest path over points `spacing` apart, with moves to all points within three."""
    shape = [round(side / spacing) for side in paths.walls.shape[::-1]]
    corner = np.array(paths.walls.shape[::-1]) / 2
    points = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1).reshape(-1, 2) * spacing - corner
    moves = [move for move in product(range(-3, 4), repeat=2) if np.gcd(*move) == 1]
    shares = np.linspace(spacing / 3, spacing, 3)
    is_free = {
        move: ~np.any([paths.is_blocked(points + share * np.array(move)) for share in shares], axis=0).reshape(shape)
        for move in moves
    }
    first, last = (tuple(np.round((point + corner) / spacing).astype(int).tolist()) for point in (start, goal))
    lengths, queue = {first: 0.0}, [(0.0, first)]
    while queue:
        length, at = heapq.heappop(queue)
        if at == last:
            return length * spacing
        for move in moves:
            to, longer = (at[0] + move[0], at[1] + move[1]), length + float(np.hypot(*move))
            if is_free[move][at] and longer < lengths.get(to, np.inf):
                lengths[to] = longer
                heapq.heappush(queue, (longer, to))
    raise AssertionError("there is no path")


@pytest.mark.parametrize("maze", [TWO_ROOMS, SNAKE, PILLARS])
def test_the_path_is_as_long_as_the_shortest_of_a_fine_grid(maze) -> None:
    paths, random = MazePaths(_walls(maze)), np.random.default_rng(0)
    centres = paths.centres()
    for _ in range(4):
        start, goal = centres[random.choice(len(centres), 2, replace=False)]
        assert paths.length(start[None], goal[None])[0] == pytest.approx(
            grid_length(paths, start, goal), rel=0.04, abs=0.1
        )


def test_the_way_through_a_snake_leads_around_each_corner() -> None:
    paths = MazePaths(_walls(SNAKE))
    position, goal, length = np.array([[-2.0, 2.0]]), np.array([[2.0, -2.0]]), 0.0
    for _ in range(10):
        to = paths.next_point(position, goal)
        assert paths.sees(position, to)
        length += np.linalg.norm(to - position)
        position = to
        if (position == goal).all():
            break
    assert length == pytest.approx(paths.length(np.array([[-2.0, 2.0]]), goal)[0])


def test_no_path_is_infinite() -> None:
    paths = MazePaths(_walls(("#####", "#.#.#", "#####")))
    assert paths.length(np.array([[-1.0, 0.0]]), np.array([[1.0, 0.0]]))[0] == np.inf


@pytest.mark.parametrize(
    "maze", [["#####", "#...", "#####"], ["#####", "#....", "#####"], ["###", "#.#", "###"], ["#x#"]]
)
def test_mazes_that_are_open_or_hold_no_way_are_refused(maze) -> None:
    with pytest.raises(ValueError, match=r"env\.maze"):
        _walls(maze)


@pytest.mark.slow
def test_a_machine_that_cannot_draw_says_so_in_one_line() -> None:
    pytest.importorskip("gymnasium_robotics")
    program = "from jepa.envs.point_maze import PointMaze; PointMaze()"
    variables = os.environ | {"MUJOCO_GL": "crayon"}
    result = subprocess.run([sys.executable, "-c", program], env=variables, capture_output=True, text=True, check=False)
    assert "ValueError: env: MuJoCo cannot draw with MUJOCO_GL=crayon" in result.stderr.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "make", ["point_maze import PointMaze; env = PointMaze()", "gym import GymEnv; env = GymEnv(id='Reacher-v5')"]
)
def test_torch_and_torchvision_are_imported_after_mujoco_has_drawn(make: str) -> None:
    pytest.importorskip("gymnasium_robotics")
    program = f"from jepa.envs.{make}; import torch, torchvision; print('alive'); env.close()"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (result.stdout, result.returncode) == ("alive\n", 0)


@pytest.mark.slow
def test_a_maze_that_nobody_closes_ends_without_complaints() -> None:
    pytest.importorskip("gymnasium_robotics")
    program = "from jepa.envs.point_maze import PointMaze; env = PointMaze()"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "Exception ignored" not in result.stderr


@pytest.fixture(scope="module")
def env() -> Iterator[PointMaze]:
    pytest.importorskip("gymnasium_robotics")
    env = PointMaze(size=16)
    yield env
    env.close()


def test_the_expert_reaches_every_goal_and_the_ball_passes_no_wall(env: PointMaze) -> None:
    starts, goals = map(np.stack, zip(*map(env.task, range(8)), strict=True))
    states = env.reset(range(8), starts, goals)[1]
    rewards, lengths = np.zeros((2, 8))
    for _ in range(70):
        before, (_, states, gained, terminated, _) = states, env.step(env.expert(states, goals))
        lengths += env.distance(before, states)
        assert env.paths.sees(before[:, :2].astype(float), states[:, :2].astype(float)).all()
        rewards += gained
        assert (env.distance(states, goals)[terminated] < STRICT).all()
    np.testing.assert_array_equal(rewards, 1)
    assert (lengths <= env.path_length(starts, goals) + 0.5).all()


def test_states_inside_a_wall_are_refused(env: PointMaze) -> None:
    for values in ([[0, 2, 0, 0]], [[9, 9, 0, 0]]):
        with pytest.raises(ValueError, match="inside a wall"):
            env.reset([0], np.array(values))


def test_the_ball_moves_as_in_gymnasium_robotics(env: PointMaze) -> None:
    random = np.random.default_rng(0)
    states = np.stack([env.sample(seed) for seed in range(30)])
    for _ in range(6):  # some run into walls, some are faster than the limit
        actions = random.choice([-1.2, -0.3, 1.0], size=(30, 2))
        after = env.simulate(states, actions)
        for state, action, moved in zip(states.astype(float), actions, after, strict=True):
            env.simulator.reset()
            env.simulator.set_state(state[:2], state[2:])
            expected = [env.simulator.step(action)[0] for _ in range(env.frame_skip)][-1]
            np.testing.assert_allclose(moved, expected, atol=1e-6)
        states = after
