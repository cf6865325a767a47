"""OrbyWorld of tiny-jepa, a world that is not ours, as an environment: a dot eats pellets while two balls drift."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tiny_jepa import OrbyWorld

from jepa.envs.types import Transition, check_actions
from jepa.types import ActionSpace


class Orby:
    settings = {}
    actions = ActionSpace(num_actions=5)
    frame_shape = (1, 32, 32)
    state_names = ("agent/x", "agent/y", "pellet/x", "pellet/y")

    def reset(
        self, seeds: Sequence[int], states: np.ndarray | None = None, goals: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        if states is not None or goals is not None:
            raise ValueError("Orby: states and goals cannot be set")
        self.worlds = [OrbyWorld(seed) for seed in seeds]
        return self._frames(), self._states()

    def step(self, actions: np.ndarray) -> Transition:
        actions = check_actions(self.actions, actions, len(self.worlds))
        rewards = [world.step(action)[1] for world, action in zip(self.worlds, actions, strict=True)]
        no = np.zeros(len(actions), dtype=bool)
        return Transition(self._frames(), self._states(), np.array(rewards, dtype=np.float32), no, no.copy())

    def close(self) -> None:
        """Nothing is open."""

    def _frames(self) -> np.ndarray:
        return np.stack([np.round(255 * world.render()).astype(np.uint8)[None] for world in self.worlds])

    def _states(self) -> np.ndarray:
        return np.array([[*world.agent, *world.pellet] for world in self.worlds], dtype=np.float32)
