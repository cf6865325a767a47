"""A corridor of cells: walk to its right end for a reward, which ends the episode; each cell is another picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jepa.envs.types import Transition, check_actions
from jepa.types import ActionSpace

SIDE = 8


class Corridor:
    """Actions: 0 left, 1 right, 2 stay. Frame: a bright column at the cell. An episode has at most `limit` steps."""

    state_names = ("place/cell",)
    frame_shape = (1, SIDE, SIDE)
    group_size = 10

    def __init__(self, *, limit: int = 12, continuous: bool = False) -> None:
        self.settings = {"limit": limit, "continuous": continuous}
        self.limit, self.continuous = limit, continuous
        self.actions = ActionSpace(low=(-2.0,), high=(2.0,)) if continuous else ActionSpace(num_actions=3)

    def reset(
        self, seeds: Sequence[int], states: np.ndarray | None = None, goals: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        self.cells = np.array([seed % 3 for seed in seeds])
        self.steps, self.has_ended = 0, np.zeros(len(seeds), dtype=bool)
        return self.frames(), self.cells[:, None].astype(np.float32)

    def step(self, actions: np.ndarray) -> Transition:
        actions = check_actions(self.actions, actions, len(self.cells))
        moves = np.sign(actions[:, 0]).astype(int) if self.continuous else np.array([-1, 1, 0])[actions]
        before = self.has_ended.copy()
        self.cells = np.where(before, self.cells, np.clip(self.cells + moves, 0, SIDE // 2 - 1))
        self.steps += 1
        terminated = (self.cells == SIDE // 2 - 1) & ~before
        truncated = np.full(len(self.cells), self.steps >= self.limit) & ~terminated & ~before
        self.has_ended |= terminated | truncated
        states = self.cells[:, None].astype(np.float32)
        return Transition(self.frames(), states, terminated.astype(np.float32), terminated, truncated)

    def frames(self) -> np.ndarray:
        frames = np.full((len(self.cells), 1, SIDE, SIDE), 20, dtype=np.uint8)
        for row, cell in enumerate(self.cells):
            frames[row, 0, :, 2 * cell : 2 * cell + 2] = 220
        return frames

    def close(self) -> None:
        pass
