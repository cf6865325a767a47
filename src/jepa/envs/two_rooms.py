"""Two rooms joined by a door: a dot moves by small steps, and goals lie in the other room. Needs nothing but NumPy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from jepa.envs.types import Task, Transition, check_actions, check_states
from jepa.types import ActionSpace, Channels

SIDE = 64
"""Height and width of a frame, in pixels."""
MAX_STEP = 4.0
"""Largest step along each axis, in pixels."""
SIGMA = 1.8
"""Standard deviation of the dot's brightness around its centre, in pixels."""
MARGIN = 3.0
"""Least distance of the dot's centre from the edges of the frame, which are the outer walls, in pixels."""
HALF_WALL = 2.0
"""Half the thickness of the wall between the rooms, in pixels."""
HALF_DOOR = 6.0
"""Half the height of the door, in pixels."""
CLEARANCE = 4.0
"""Least distance of starts and goals from the faces of the wall, in pixels."""
WALLS = (20.0, 44.0)
"""Smallest and largest x of the wall's middle with random walls, in pixels."""
DOORS = (12.0, 52.0)
"""Smallest and largest y of the door's middle with random walls, in pixels."""
ROWS = 256
"""Number of frames that are drawn together, so that they stay in the cache of the processor."""
SUBSTEPS = 16
"""Number of moves, of at most a quarter of a pixel each, that a step consists of, so that no wall is jumped."""
MODERATE, STRICT = 4.0, 2.3
"""Largest distances to the goal, in pixels, that count as success; 2.3 of 64 pixels are 8 of 224."""
DOT_COLOUR, WALL_COLOUR = np.array([255.0, 90.0, 60.0]), np.array([40.0, 110.0, 150.0])
"""Red, green and blue of frames with three channels."""
GREY_DOT, GREY_WALL = 255.0, 110.0
"""Brightness in frames with one channel."""
X, Y, WALL, DOOR = range(4)
"""Columns of a state."""


class TwoRooms:
    """Environments that are stepped and drawn together, as many as `reset` gets seeds.

    A state is (x, y, x of the wall, y of the door) in pixels from the upper left corner. Walls stop the dot along x,
    and it slides along them; collisions are tested along the whole segment. With `walls=random` wall and door differ
    between episodes. An environment that has ended keeps its state until it is reset.
    """

    name = "two_rooms"
    state_names = ("position/x", "position/y", "layout/wall", "layout/door")
    goal_size = 2
    extent = ((MARGIN, SIDE - MARGIN), (MARGIN, SIDE - MARGIN))
    """The first columns of a state, which a goal fixes."""
    thresholds = {"moderate": MODERATE, "strict": STRICT}

    def __init__(self, *, walls: Literal["fixed", "random"] = "fixed", channels: Channels = 1) -> None:
        self.settings = {"walls": walls, "channels": channels}
        self.walls = walls
        self.frame_shape = (channels, SIDE, SIDE)
        self.actions = ActionSpace(low=(-MAX_STEP, -MAX_STEP), high=(MAX_STEP, MAX_STEP))

    def reset(
        self, seeds: Sequence[int], states: np.ndarray | None = None, goals: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """One seed for each environment, or their states [B, 4] -> frames [B, C, H, W] and states [B, 4].

        Raises ValueError for states or goals inside a wall.
        """
        drawn = np.stack([self.sample(seed) for seed in seeds])
        self.states = drawn if states is None else check_states(states, drawn.shape)
        self.goals = None if goals is None else check_states(goals, drawn.shape)
        for name, values in {"state": self.states, "goal": self.goals}.items():
            if values is not None and (blocked := is_blocked(values)).any():
                row = int(np.argmax(blocked))
                raise ValueError(f"{name} {row} {np.round(values[row], 1).tolist()} lies inside a wall; choose another")
        self.has_ended = np.zeros(len(seeds), dtype=bool)
        return self.render(self.states), self.states.copy()

    def step(self, actions: np.ndarray) -> Transition:
        """[B, 2] in pixels; with goals an environment ends when its dot is within `STRICT` of the goal."""
        actions = check_actions(self.actions, actions, len(self.states))
        moved = simulate(self.states, actions)
        self.states = np.where(self.has_ended[:, None], self.states, moved)
        reached = np.zeros(len(moved), dtype=bool) if self.goals is None else distance(moved, self.goals) < STRICT
        reached &= ~self.has_ended
        self.has_ended |= reached
        rewards = reached.astype(np.float32)
        return Transition(self.render(self.states), self.states.copy(), rewards, reached, np.zeros_like(reached))

    def close(self) -> None:
        """Nothing is open."""

    def sample(self, seed: int) -> np.ndarray:
        """A state [4] that depends on the seed alone, with the dot anywhere in the two rooms."""
        random = np.random.default_rng(seed)
        layout = self._layout(random)
        return np.array([*_position(random, layout[0], int(random.integers(2))), *layout], dtype=np.float32)

    def task(self, seed: int) -> Task:
        """Start and goal in different rooms."""
        random = np.random.default_rng([seed, 1])
        layout, side = self._layout(random), int(random.integers(2))
        start, goal = (np.array([*_position(random, layout[0], room), *layout]) for room in (side, 1 - side))
        return Task(start.astype(np.float32), goal.astype(np.float32))

    def _layout(self, random: np.random.Generator) -> tuple[float, float]:
        wall, door = random.uniform(*WALLS), random.uniform(*DOORS)
        return (SIDE / 2, SIDE / 2) if self.walls == "fixed" else (wall, door)

    def render(self, states: np.ndarray) -> np.ndarray:
        """[B, 4] -> uint8 [B, C, H, W]"""
        parts = range(0, len(states), ROWS)
        return np.concatenate([self._render(states[start : start + ROWS]) for start in parts])

    def _render(self, states: np.ndarray) -> np.ndarray:
        pixels = np.arange(SIDE, dtype=np.float32) + 0.5
        across, down = (_bump(pixels - states[:, column, None]) for column in (X, Y))  # [B, W], [B, H]
        dot = down[:, :, None] * across[:, None]  # [B, H, W]
        in_wall = np.abs(pixels - states[:, WALL, None]) < HALF_WALL  # [B, W]
        in_door = np.abs(pixels - states[:, DOOR, None]) < HALF_DOOR  # [B, H]
        wall = (in_wall[:, None] & ~in_door[:, :, None]).astype(np.float32)
        if self.frame_shape[0] == 1:
            return np.maximum(GREY_WALL * wall, GREY_DOT * dot).astype(np.uint8)[:, None]
        colours = zip(WALL_COLOUR, DOT_COLOUR, strict=True)
        return np.stack([np.maximum(a * wall, b * dot).astype(np.uint8) for a, b in colours], axis=1)

    def simulate(self, states: np.ndarray, actions: np.ndarray) -> np.ndarray:
        """True dynamics: [n, 4], [n, 2] -> [n, 4]"""
        return simulate(states, actions)

    def distance(self, states: np.ndarray, goals: np.ndarray) -> np.ndarray:
        """Of the dot from the goal, in pixels: [n, 4], [n, 4] -> [n]"""
        return distance(states, goals)

    def path_length(self, states: np.ndarray, goals: np.ndarray) -> np.ndarray:
        """Shortest way through the door: [n, 4], [n, 4] -> [n]"""
        return path_length(states, goals)

    def straight_line(self, states: np.ndarray, goals: np.ndarray) -> np.ndarray:
        """The step straight to the goal: [n, 4], [n, 4] -> [n, 2]"""
        return _step(goals[:, :2] - states[:, :2])

    def expert(self, states: np.ndarray, goals: np.ndarray) -> np.ndarray:
        """The step along the shortest path: [n, 4], [n, 4] -> [n, 2]"""
        return _step(next_corner(states, goals) - states[:, :2])


def _step(way: np.ndarray) -> np.ndarray:
    """[n, 2] -> [n, 2]: as far along the way as a step goes"""
    return way * np.minimum(1, MAX_STEP / np.maximum(np.abs(way).max(axis=1, keepdims=True), 1e-6))


def simulate(states: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """[n, 4], [n, 2] -> [n, 4]: the dot moves along x, then along y, in `SUBSTEPS` parts, each only if it is free."""
    x, y, wall, door = states.T.copy()
    dx, dy = np.clip(actions, -MAX_STEP, MAX_STEP).T / SUBSTEPS
    for _ in range(SUBSTEPS):
        next_x = np.clip(x + dx, MARGIN, SIDE - MARGIN)
        x = np.where(_in_wall(next_x, y, wall, door), x, next_x)
        next_y = np.clip(y + dy, MARGIN, SIDE - MARGIN)
        y = np.where(_in_wall(x, next_y, wall, door), y, next_y)
    return np.stack([x, y, wall, door], axis=1).astype(states.dtype)


def is_blocked(states: np.ndarray) -> np.ndarray:
    """[n, 4] -> bool [n]: inside the wall or outside of the rooms"""
    x, y = states[:, X], states[:, Y]
    outside = (np.minimum(x, y) < MARGIN - 1e-3) | (np.maximum(x, y) > SIDE - MARGIN + 1e-3)
    return outside | _in_wall(*states.T)


def distance(states: np.ndarray, goals: np.ndarray) -> np.ndarray:
    """[n, 4], [n, 4] -> [n]: in pixels, through walls"""
    return np.linalg.norm(states[:, :2] - goals[:, :2], axis=1)


def path_length(states: np.ndarray, goals: np.ndarray) -> np.ndarray:
    """[n, 4], [n, 4] -> [n]: length of the shortest path, in pixels"""
    start, goal = states[:, :2], goals[:, :2]
    first, second = _crossings(states, goals)
    legs = (first - start, second - first, goal - second)
    return sum((np.linalg.norm(leg, axis=1) for leg in legs), start=np.zeros(len(states)))


def next_corner(states: np.ndarray, goals: np.ndarray) -> np.ndarray:
    """[n, 4], [n, 4] -> [n, 2]: the end of the first straight part of the shortest path"""
    first, second = _crossings(states, goals)
    near = np.linalg.norm(first - states[:, :2], axis=1) < 1e-3
    return np.where(near[:, None], np.where(_same(second, states)[:, None], goals[:, :2], second), first)


def _same(points: np.ndarray, states: np.ndarray) -> np.ndarray:
    return np.linalg.norm(points - states[:, :2], axis=1) < 1e-3


def _crossings(states: np.ndarray, goals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points [n, 2] where the shortest path enters and leaves the door; the start itself where it does neither."""
    start, goal = states[:, :2].astype(float), goals[:, :2].astype(float)
    sign = np.where(goal[:, X] >= start[:, X], 1.0, -1.0)
    gates = [states[:, WALL] - sign * (HALF_WALL + 0.05), states[:, WALL] + sign * (HALF_WALL + 0.05)]
    low, high = (states[:, DOOR] + side * (HALF_DOOR - 0.3) for side in (-1, 1))
    first, second = start.copy(), start.copy()
    for _ in range(6):  # each point is optimal given the other; a convex problem in two numbers
        second = _through(gates[1], first, goal, low, high, start)
        first = _through(gates[0], start, second, low, high, start)
    second = np.where(_between(gates[1], start, goal)[:, None], second, first)
    return first, second


def _through(
    gate: np.ndarray, begin: np.ndarray, end: np.ndarray, low: np.ndarray, high: np.ndarray, start: np.ndarray
) -> np.ndarray:
    """[n, 2]: where the segment crosses x = `gate`, moved into the door; `begin` if it does not cross it."""
    span = end[:, X] - begin[:, X]
    share = (gate - begin[:, X]) / np.where(np.abs(span) < 1e-9, 1.0, span)
    y = np.clip(begin[:, Y] + share * (end[:, Y] - begin[:, Y]), low, high)
    crosses = _between(gate, start, end)
    return np.where(crosses[:, None], np.stack([gate, y], axis=1), begin)


def _between(gate: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    return (gate - start[:, X]) * (end[:, X] - gate) > 0


def _in_wall(x: np.ndarray, y: np.ndarray, wall: np.ndarray, door: np.ndarray) -> np.ndarray:
    return (np.abs(x - wall) < HALF_WALL) & (np.abs(y - door) > HALF_DOOR)


def _position(random: np.random.Generator, wall: float, room: int) -> tuple[float, float]:
    """A point in the left (0) or right (1) room."""
    gap = HALF_WALL + CLEARANCE
    low, high = (MARGIN, wall - gap) if room == 0 else (wall + gap, SIDE - MARGIN)
    return random.uniform(low, high), random.uniform(MARGIN, SIDE - MARGIN)


def _bump(offset: np.ndarray) -> np.ndarray:
    return np.exp(np.square(offset) * np.float32(-0.5 / SIGMA**2))
