"""Policies for collecting: actions that depend on the seed of the episode, whatever it is collected with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from jepa.types import ActionSpace, Share


class Policy(Protocol):
    """Acts in B episodes at once."""

    settings: Mapping[str, Any]
    """Arguments of the constructor."""

    def begin(self, space: ActionSpace, seeds: Sequence[int], num_steps: int) -> None:
        """Start B episodes of at most `num_steps` steps."""
        ...

    def act(self, step: int, frames: np.ndarray, states: np.ndarray) -> np.ndarray:
        """uint8 [B, C, H, W], [B, S] -> actions [B, A], or [B] if they are discrete"""
        ...


class StickyRandom:
    """Repeats the last action with probability `keep`, else takes a new one, uniform between the bounds."""

    def __init__(self, *, keep: Share = 0.8) -> None:
        self.keep = keep
        self.settings = {"keep": keep}

    def begin(self, space: ActionSpace, seeds: Sequence[int], num_steps: int) -> None:
        self.actions = np.stack([self._draw(space, seed, num_steps) for seed in seeds])  # [B, T, A] or [B, T]

    def _draw(self, space: ActionSpace, seed: int, num_steps: int) -> np.ndarray:
        random = np.random.default_rng([seed, 2])
        if space.is_discrete:
            fresh = random.integers(space.num_actions, size=num_steps)
        else:
            fresh = random.uniform(space.low, space.high, size=(num_steps, len(space.low))).astype(np.float32)
        is_new = random.random(num_steps) >= self.keep
        is_new[0] = True
        return fresh[np.maximum.accumulate(np.where(is_new, np.arange(num_steps), 0))]

    def act(self, step: int, frames: np.ndarray, states: np.ndarray) -> np.ndarray:
        return self.actions[:, step]


class Random(StickyRandom):
    """A new action in every step, uniform between the bounds."""

    def __init__(self) -> None:
        super().__init__(keep=0.0)
        self.settings = {}
