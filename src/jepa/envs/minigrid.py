"""MiniGrid-Empty: an agent turns and walks in an empty room until it stands on the green square."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from jepa.envs.gym import GymEnv, known_state, require
from jepa.envs.types import Task, check_states

LEFT, RIGHT, FORWARD, DONE = 0, 1, 2, 6
"""Actions of MiniGrid."""


class EmptyGrid(GymEnv):
    """MiniGrid-Empty environments, whose layout never changes, so that (x, y, direction) is the whole state.

    Directions are 0 right, 1 down, 2 left, 3 up. The goal of every task is the green square, in any direction; an
    episode that reaches it ends with a reward above 0. Lengths of paths are numbers of actions.
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
        start = np.array([1 + cell % width, 1 + cell // width, direction], dtype=np.float32)
        return Task(start, np.array([*self.goal, 0], dtype=np.float32))

    def render(self, states: np.ndarray) -> np.ndarray:
        """[n, 3] -> uint8 [n, C, H, W]"""
        return np.stack([self._frame(_set(self.canvas, state)) for state in self._checked(states)])

    def simulate(self, states: np.ndarray, actions: np.ndarray) -> np.ndarray:
        """[n, 3], [n] -> [n, 3]"""
        moved = []
        for state, action in zip(self._checked(states), actions, strict=True):
            env = _set(self.canvas, state)
            for _ in range(self.frame_skip):
                env.unwrapped.step(int(action))
            moved.append(known_state(env, None))
        return np.stack(moved)

    def distance(self, states: np.ndarray, goals: np.ndarray) -> np.ndarray:
        """Columns and rows between the agent and the goal: [n, 3], [n, 3] -> [n]"""
        return np.abs(goals[:, :2] - states[:, :2]).sum(axis=1)

    def path_length(self, states: np.ndarray, goals: np.ndarray) -> np.ndarray:
        """Number of actions: [n, 3], [n, 3] -> [n]"""
        turns = _turns(states, goals)
        needs_both = np.isfinite(turns).all(axis=1)
        return self.distance(states, goals) + np.where(self._arrived(states, goals), 0, turns.min(axis=1) + needs_both)

    def expert(self, states: np.ndarray, goals: np.ndarray) -> np.ndarray:
        """The next action of a shortest path: [n, 3], [n, 3] -> [n]"""
        turns = _turns(states, goals)
        towards = np.take_along_axis(_directions(states, goals), turns.argmin(axis=1)[:, None], axis=1)[:, 0]
        turn = np.where((towards - states[:, 2]) % 4 == 3, LEFT, RIGHT)
        actions = np.where(turns.min(axis=1) == 0, FORWARD, turn)
        return np.where(self._arrived(states, goals), DONE, actions).astype(np.int64)

    def _arrived(self, states: np.ndarray, goals: np.ndarray) -> np.ndarray:
        return self.distance(states, goals) == 0


def _set(env: Any, state: np.ndarray) -> Any:
    """The environment, with its agent at (x, y, direction)."""
    x, y, direction = map(int, state)
    env.unwrapped.agent_pos, env.unwrapped.agent_dir = (x, y), direction
    return env


def _directions(states: np.ndarray, goals: np.ndarray) -> np.ndarray:
    """[n, 2]: directions along x and along y that lead to the goal"""
    across, down = (goals[:, :2] - states[:, :2]).T
    return np.stack([np.where(across >= 0, 0, 2), np.where(down >= 0, 1, 3)], axis=1)


def _turns(states: np.ndarray, goals: np.ndarray) -> np.ndarray:
    """[n, 2]: turns until the agent faces the goal along x and along y; infinite along an axis that has no way left"""
    angles = np.abs(_directions(states, goals) - states[:, 2:])
    return np.where(goals[:, :2] == states[:, :2], np.inf, np.minimum(angles, 4 - angles))
