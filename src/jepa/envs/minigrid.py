"""MiniGrid-Empty: an agent turns and walks in an empty room until it stands on the green square."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from jepa.envs.gym import GymEnv, known_state, require
from jepa.envs.types import Task, check_states

DONE = 6
"""MiniGrid's action that changes nothing; 0, 1 and 2 turn left, turn right and walk."""


class EmptyGrid(GymEnv):
    """MiniGrid-Empty environments, whose layout never changes, so that (x, y, direction) is the whole state.

    Directions are 0 right, 1 down, 2 left, 3 up. An episode that reaches the green square ends with a reward above 0,
    whatever the direction; the goal of a task has the direction of a shortest way there. Lengths of paths are numbers
    of actions until the agent stands as the goal shows, infinite from a green square in another direction.
    """

    requires = ("envs", "gymnasium", "minigrid")

    thresholds = {"reached": 0.5}
    goal_size = 2

    def _make(self) -> Any:
        env = super()._make()
        if not isinstance(env.unwrapped, require("minigrid.envs").EmptyEnv):
            raise ValueError(f"env.id={self.id}: only MiniGrid-Empty environments have known tasks; choose env=gym")
        return env

    @cached_property
    def canvas(self) -> Any:
        """An environment beside those of the episodes, for drawing and simulating."""
        env = self._make()
        env.reset(seed=0)
        return env

    @property
    def goal(self) -> np.ndarray:
        """Column and row of the green square."""
        inner = self.canvas.unwrapped
        return np.array([inner.width - 2, inner.height - 2])

    def _place(self, count: int, states: np.ndarray | None, goals: np.ndarray | None) -> None:
        shape = (count, len(self.state_names))
        if goals is not None and (is_other := (check_states(goals, shape)[:, :2] != self.goal).any(axis=1)).any():
            row = int(np.argmax(is_other))
            raise ValueError(f"goal {row} {goals[row].tolist()}: the goal is the green square {self.goal.tolist()}")
        placed = () if states is None else self._checked(check_states(states, shape))
        for env, state in zip(self.envs, placed, strict=False):
            _set(env, state)

    def _checked(self, states: np.ndarray) -> np.ndarray:
        """int64 [n, 3]. Raises ValueError for states outside of the room."""
        states = np.asarray(states)
        is_valid = (states == np.round(states)) & (states >= [1, 1, 0]) & (states <= [*self.goal, 3])
        if not is_valid.all():
            row = int(np.argmin(is_valid.all(axis=1)))
            limits = f"whole numbers from 1 to {self.goal.tolist()}, and a direction from 0 to 3"
            raise ValueError(f"state {row} {states[row].tolist()}: takes a column and a row, {limits}")
        return states.astype(np.int64)

    def task(self, seed: int) -> Task:
        """A start anywhere but on the green square."""
        random = np.random.default_rng([seed, 1])
        width, height = self.goal
        cell, direction = int(random.integers(width * height - 1)), int(random.integers(4))
        start = np.array([[1 + cell % width, 1 + cell // width, direction]], dtype=np.float32)
        goals = np.array([[*self.goal, direction] for direction in range(4)], dtype=np.float32)
        lengths = self.path_length(start.repeat(4, axis=0), goals)
        return Task(start[0], goals[lengths.argmin()])

    def render(self, states: np.ndarray) -> np.ndarray:
        """[n, 3] -> uint8 [n, C, H, W]"""
        return np.stack([self._frame(_set(self.canvas, state)) for state in self._checked(states)])

    def simulate(self, states: np.ndarray, actions: np.ndarray) -> np.ndarray:
        """[n, 3], [n] -> [n, 3]; on the green square an episode has ended, and its state stays."""
        moved = []
        for state, action in zip(self._checked(states), actions, strict=True):
            env = _set(self.canvas, state)
            for _ in range(self.frame_skip):
                if (env.unwrapped.agent_pos != self.goal).any():
                    env.unwrapped.step(int(action))
            moved.append(known_state(env, None))
        return np.stack(moved)

    def distance(self, states: np.ndarray, goals: np.ndarray) -> np.ndarray:
        """Columns and rows between the agent and the goal: [n, 3], [n, 3] -> [n]"""
        return np.abs(goals[:, :2] - states[:, :2]).sum(axis=1)

    def path_length(self, states: np.ndarray, goals: np.ndarray) -> np.ndarray:
        """Number of actions: [n, 3], [n, 3] -> float64 [n]"""
        return self._lengths[self._number(states), self._number(goals)]

    def expert(self, states: np.ndarray, goals: np.ndarray) -> np.ndarray:
        """The next action of a shortest path, or "done" on the goal's square: [n, 3], [n, 3] -> [n]"""
        after = self._moves[self._number(states)]  # [n, 3]
        actions = self._lengths[after, self._number(goals)[:, None]].argmin(axis=1)
        return np.where(self.distance(states, goals) == 0, DONE, actions).astype(np.int64)

    def _number(self, states: np.ndarray) -> np.ndarray:
        """[n, 3] -> int64 [n]: the place of each state among all of them"""
        x, y, direction = self._checked(states).T
        return ((y - 1) * self.goal[0] + x - 1) * 4 + direction

    @cached_property
    def _moves(self) -> np.ndarray:
        """int64 [S, 3]: the states that turning left, turning right and walking lead to."""
        width, height = self.goal
        y, x, direction = (axis.ravel() for axis in np.indices((height, width, 4)))
        states = np.stack([x + 1, y + 1, direction], axis=1)
        after = [self.simulate(states, np.full(len(states), action)) for action in range(3)]
        return np.stack([self._number(moved) for moved in after], axis=1)

    @cached_property
    def _lengths(self) -> np.ndarray:
        """float64 [S, S]: actions from each state to each other, by breadth-first search."""
        lengths = np.where(np.eye(len(self._moves), dtype=bool), 0, np.inf)
        while True:
            shorter = np.minimum(lengths, 1 + lengths[self._moves].min(axis=1))
            if np.array_equal(shorter, lengths):
                return lengths
            lengths = shorter


def _set(env: Any, state: np.ndarray) -> Any:
    """The environment, with its agent at (x, y, direction)."""
    x, y, direction = map(int, state)
    env.unwrapped.agent_pos, env.unwrapped.agent_dir = (x, y), direction
    return env
