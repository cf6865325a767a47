"""PointMaze of gymnasium-robotics: forces push a ball through a maze. Needs `gymnasium-robotics` and MuJoCo."""

from __future__ import annotations

import atexit
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import numpy as np

from jepa.envs.gym import cannot_draw, import_mujoco, make, to_frame
from jepa.envs.maze_paths import MazePaths
from jepa.envs.types import Task, Transition, check_actions, check_states
from jepa.types import ActionSpace, Channels, PositiveInt

TWO_ROOMS = ("#######", "#..#..#", "#..#..#", "#.....#", "#..#..#", "#..#..#", "#######")
CONTACT = 0.09
"""Distance from a wall, in cells, below which the ball of radius 0.1 is inside it."""
NOISE = 0.35
"""Largest distance of a start or a goal from the middle of its cell along each axis, in cells."""
MODERATE, STRICT = 0.45, 0.25
"""Largest distances to the goal, in cells, that count as success; 0.45 is the one of gymnasium-robotics."""
STEP, ACCELERATION = 0.01, 23.9
"""Seconds of a step of the simulator; acceleration by an action of 1, in cells per square second."""
MAX_SPEED = 5.0
"""Largest velocity along an axis at the start of a step of the simulator, as in gymnasium-robotics."""
EXPERT_SPEED, BRAKING = 2.5, 4.0
"""Of the expert: largest speed in cells per second; share of the distance left that it covers in a second."""
CAMERA_HEIGHT = 1.24
"""Height of the camera over the width of what it sees, at MuJoCo's 45 degrees."""
NUM_DRAWS = 100
"""Draws of start and goal until one does not lie in sight of the other."""


class PointMaze:
    """Mazes that are stepped together in one simulator, as many as `reset` gets seeds.

    The rows of `maze` have # for walls. A state is (x, y, velocity along x, along y) in cells and cells per second from
    the middle of the maze, y upwards; it alone determines frames and dynamics. A transition is `frame_skip` steps of
    0.01 seconds with the same force. With goals, an environment ends when its ball is within `STRICT` of the goal. The
    goal of gymnasium-robotics, which is drawn into the picture, is hidden.
    """

    requires = ("envs", "gymnasium_robotics", "mujoco")

    state_names = ("position/x", "position/y", "velocity/x", "velocity/y")
    goal_size = 2
    group_size = 25
    thresholds = {"moderate": MODERATE, "strict": STRICT}

    def __init__(
        self, *, maze: Sequence[str] = TWO_ROOMS, size: PositiveInt = 64, channels: Channels = 3,
        frame_skip: PositiveInt = 5,
    ) -> None:  # fmt: skip
        self.settings = {"maze": list(maze), "size": size, "channels": channels, "frame_skip": frame_skip}
        self.frame_skip, self.frame_shape = frame_skip, (channels, size, size)
        self.paths = MazePaths(_walls(maze))
        self.actions = ActionSpace(low=(-1.0, -1.0), high=(1.0, 1.0))
        self.env = _make(self.paths.walls, size)
        self.simulator = self.env.unwrapped.point_env
        self.rollout = import_module("mujoco.rollout").rollout
        self.model = self.env.unwrapped.model
        self.data = import_mujoco().MjData(self.model)
        atexit.register(self.env.close)  # before MuJoCo ends, whose windows else complain

    def reset(
        self, seeds: Sequence[int], states: np.ndarray | None = None, goals: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Raises ValueError for states or goals inside a wall."""
        drawn = np.stack([self.sample(seed) for seed in seeds])
        self.states = drawn if states is None else check_states(states, drawn.shape)
        self.goals = None if goals is None else check_states(goals, drawn.shape)
        for name, values in {"state": self.states, "goal": self.goals}.items():
            if values is not None and (blocked := self.paths.is_blocked(values[:, :2], CONTACT)).any():
                row = int(np.argmax(blocked))
                raise ValueError(f"{name} {row} {np.round(values[row], 2).tolist()} lies inside a wall; choose another")
        self.frames = self.render(self.states)
        self.has_ended = np.zeros(len(seeds), dtype=bool)
        return self.frames.copy(), self.states.copy()

    def step(self, actions: np.ndarray) -> Transition:
        """[B, 2]: forces from -1 to 1"""
        actions = check_actions(self.actions, actions, len(self.states))
        goes_on = ~self.has_ended
        if goes_on.any():
            self.states[goes_on] = self.simulate(self.states[goes_on], actions[goes_on])
            self.frames[goes_on] = self.render(self.states[goes_on])
        reached = np.zeros(len(actions), dtype=bool)
        if self.goals is not None:
            reached = goes_on & (self.distance(self.states, self.goals) < STRICT)
        self.has_ended |= reached
        no = np.zeros_like(reached)
        return Transition(self.frames.copy(), self.states.copy(), reached.astype(np.float32), reached, no)

    def close(self) -> None:
        atexit.unregister(self.env.close)
        self.env.close()

    def sample(self, seed: int) -> np.ndarray:
        """A state [4] at rest that depends on the seed alone."""
        return self._draw(np.random.default_rng(seed))

    def task(self, seed: int) -> Task:
        """Start and goal, each out of sight of the other unless the maze hardly has such places."""
        random = np.random.default_rng([seed, 1])
        start, goal = self._draw(random), self._draw(random)
        for _ in range(NUM_DRAWS):
            if not self.paths.sees(start[None, :2], goal[None, :2])[0]:
                break
            start, goal = self._draw(random), self._draw(random)
        return Task(start, goal)

    def _draw(self, random: np.random.Generator) -> np.ndarray:
        cells = self.paths.centres()
        position = cells[random.integers(len(cells))] + random.uniform(-NOISE, NOISE, size=2)
        return np.array([*position, 0, 0], dtype=np.float32)

    def render(self, states: np.ndarray) -> np.ndarray:
        """[n, 4] -> uint8 [n, C, H, W]"""
        frames = []
        for state in states.astype(float):
            self.simulator.set_state(state[:2], np.zeros(2))
            frames.append(to_frame(self.env.render(), self.frame_shape))
        return np.stack(frames)

    def simulate(self, states: np.ndarray, actions: np.ndarray) -> np.ndarray:
        """[n, 4], [n, 2] -> [n, 4]"""
        now = np.concatenate([np.zeros((len(states), 1)), states], axis=1)  # the time, as MuJoCo has it, and the state
        forces = np.clip(actions, -1, 1).astype(float)[:, None]
        for _ in range(self.frame_skip):
            now[:, 3:] = np.clip(now[:, 3:], -MAX_SPEED, MAX_SPEED)
            now = self.rollout(self.model, self.data, now, forces)[0][:, 0]
        return now[:, 1:].astype(np.float32)

    def distance(self, states: np.ndarray, goals: np.ndarray) -> np.ndarray:
        """Of the ball from the goal, in cells, through walls: [n, 4], [n, 4] -> [n]"""
        return np.linalg.norm(states[:, :2] - goals[:, :2], axis=1)

    def path_length(self, states: np.ndarray, goals: np.ndarray) -> np.ndarray:
        """Shortest way around the walls, in cells: [n, 4], [n, 4] -> [n]"""
        return self.paths.length(states[:, :2].astype(float), goals[:, :2].astype(float))

    def expert(self, states: np.ndarray, goals: np.ndarray) -> np.ndarray:
        """The force that gives the ball a speed along the shortest path: [n, 4], [n, 4] -> [n, 2]"""
        position, target = states[:, :2].astype(float), goals[:, :2].astype(float)
        return self._force(states, self.paths.next_point(position, target) - position)

    def straight_line(self, states: np.ndarray, goals: np.ndarray) -> np.ndarray:
        """The force that gives the ball a speed straight to the goal: [n, 4], [n, 4] -> [n, 2]"""
        return self._force(states, goals[:, :2].astype(float) - states[:, :2])

    def _force(self, states: np.ndarray, way: np.ndarray) -> np.ndarray:
        """[n, 4], way ahead [n, 2] -> [n, 2]"""
        length = np.maximum(np.linalg.norm(way, axis=1, keepdims=True), 1e-6)
        wanted = way / length * np.minimum(EXPERT_SPEED, BRAKING * length)
        change = wanted - states[:, 2:].astype(float)
        return np.clip(change / (ACCELERATION * STEP * self.frame_skip), -1, 1).astype(np.float32)


def _walls(maze: Sequence[str]) -> np.ndarray:
    """bool [rows, columns]. Raises ValueError for a maze that is open or has less than two free cells."""
    widths = {len(row) for row in maze}
    if len(widths) != 1 or set("".join(maze)) - set("#."):
        raise ValueError(f"env.maze={list(maze)}: takes rows of the same length, of # for walls and . for free cells")
    walls = np.array([[cell == "#" for cell in row] for row in maze])
    if not (walls[[0, -1]].all() and walls[:, [0, -1]].all()) or (~walls).sum() < 2:
        raise ValueError(f"env.maze={list(maze)}: takes walls all around and at least two free cells")
    return walls


def _make(walls: np.ndarray, size: int) -> Any:
    """The simulator, seen from above, without shadows and without the target. Raises ValueError if it cannot draw."""
    mujoco = import_mujoco()
    kwargs = {"maze_map": walls.astype(int).tolist(), "width": size, "height": size}
    env = make("PointMaze_UMaze-v3", kwargs, limit=-1)
    model, simulator = env.unwrapped.model, env.unwrapped.point_env
    model.light_castshadow[:], model.mat_reflectance[:] = 0, 0
    model.site_rgba[env.unwrapped.target_site_id, 3] = 0
    height = CAMERA_HEIGHT * (max(walls.shape) - 1.4)  # most of the outer walls is left out
    camera = {"distance": height, "azimuth": 90.0, "elevation": -90.0, "lookat": np.zeros(3)}
    simulator.mujoco_renderer.default_cam_config = camera
    env.reset(seed=0)
    simulator.init_qpos[:] = 0
    try:
        env.render()
    except mujoco.FatalError as error:
        raise cannot_draw(error) from error
    return env
