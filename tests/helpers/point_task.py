"""PointMass of torch-world, a world that is not ours, as an environment: a dot in a square moves to a fixed goal."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch_world.envs.point_mass import PointMass

from jepa.envs.types import Task, Transition, check_actions
from jepa.types import ActionSpace

GOAL = (0.75, 0.25)
"""Goal of torch-world's own experiment on this world."""


class PointTask:
    actions = ActionSpace(low=(-1.0, -1.0), high=(1.0, 1.0))
    state_names = ("position/x", "position/y")
    thresholds = {"reached": PointMass.radius}

    def __init__(self, *, size: int = 32) -> None:
        self.settings = {"size": size}
        self.frame_shape = (3, size, size)
        self.world = PointMass(size=size)

    def reset(
        self, seeds: Sequence[int], states: np.ndarray | None = None, goals: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        self.states = np.stack([self.task(seed).start for seed in seeds]) if states is None else states
        return self.render(self.states), self.states

    def step(self, actions: np.ndarray) -> Transition:
        actions = check_actions(self.actions, actions, len(self.states))
        self.world.state = torch.from_numpy(self.states)
        self.world.step(torch.from_numpy(actions))
        self.states = self.world.state.numpy()
        no = np.zeros(len(actions), dtype=bool)
        return Transition(self.render(self.states), self.states, np.zeros(len(actions), np.float32), no, no.copy())

    def close(self) -> None:
        """Nothing is open."""

    def task(self, seed: int) -> Task:
        start = np.random.default_rng(seed).uniform(PointMass.low, PointMass.high, size=2)
        return Task(start.astype(np.float32), np.array(GOAL, dtype=np.float32))

    def distance(self, states: np.ndarray, goals: np.ndarray) -> np.ndarray:
        return np.linalg.norm(states - goals, axis=1)

    def render(self, states: np.ndarray) -> np.ndarray:
        return (255 * self.world.render(torch.from_numpy(states)).clamp(0, 1)).round().byte().numpy()
