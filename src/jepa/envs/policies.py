"""Policies for collecting: actions that depend on the seed of the episode, whatever it is collected with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from jepa.envs.types import BatchedEnv, EnvTraits
from jepa.errors import ConfigError
from jepa.types import ActionSpace, Share, Traits


class BatchedPolicy(Protocol):
    """Acts in B episodes at once."""

    settings: Mapping[str, Any]
    """Arguments of the constructor."""

    def begin(self, space: ActionSpace, seeds: Sequence[int], num_steps: int) -> None:
        """Start B episodes of at most `num_steps` steps."""
        ...

    def act(self, step: int, frames: np.ndarray, states: np.ndarray) -> np.ndarray:
        """uint8 [B, C, H, W], [B, S] -> actions [B, A], or [B] if they are discrete"""
        ...


@dataclass(frozen=True)
class PolicyTraits(Traits):
    """Optional attributes of a policy."""

    tasks: Callable[[BatchedEnv, Sequence[int]], tuple[np.ndarray, np.ndarray]] | None = None
    """environment, seeds [B] -> states [B, S] in which the episodes begin, and their goals [B, S]; before `begin`"""


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


class Expert:
    """The environment's own expert, from the start to the goal of the task of each seed.

    A share `random` of the actions is uniform between the bounds instead.
    """

    def __init__(self, *, random: Share = 0.0) -> None:
        self.random = random
        self.settings = {"random": random}

    def tasks(self, env: BatchedEnv, seeds: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Raises ConfigError for an environment without tasks or without an expert."""
        traits = EnvTraits.of(env)
        if traits.task is None or traits.expert is None:
            raise ConfigError(
                [f"policy=expert: {type(env).__name__} has no tasks with an expert; choose policy=random"]
            )
        self.expert = traits.expert
        starts, goals = zip(*map(traits.task, seeds), strict=True)
        self.goals = np.stack(goals)
        return np.stack(starts), self.goals

    def begin(self, space: ActionSpace, seeds: Sequence[int], num_steps: int) -> None:
        self.fresh = Random()
        self.fresh.begin(space, seeds, num_steps)
        draws = [np.random.default_rng([seed, 3]).random(num_steps) for seed in seeds]
        self.is_random = np.stack(draws) < self.random  # [B, T]

    def act(self, step: int, frames: np.ndarray, states: np.ndarray) -> np.ndarray:
        actions = self.expert(states, self.goals)
        is_random = self.is_random[:, step].reshape(-1, *[1] * (actions.ndim - 1))
        return np.where(is_random, self.fresh.act(step, frames, states), actions)
