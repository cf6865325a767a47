"""The same actions in an environment and in a dream, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from jepa.envs.types import BatchedEnv
from jepa.rl.policy import Actor
from jepa.rl.replay import idle_action
from jepa.seeding import derive_seed


class Film(NamedTuple):
    """Of one episode; frame t + 1 follows from action t."""

    real: np.ndarray
    """uint8 [T + 1, C, H, W]"""
    dreamt: np.ndarray
    """uint8 [T + 1, C, h, w]; the first frame is the real one as the world draws it"""
    actions: np.ndarray
    real_rewards: np.ndarray
    dreamt_rewards: np.ndarray
    """float32 [T]"""


class Stage:
    """An environment and a dream that begin with the same frame; each action is taken in both."""

    def __init__(self, env: BatchedEnv, actor: Actor, seed: int) -> None:
        self.env, self.actor, world = env, actor, actor.world
        frames, _ = env.reset([derive_seed(seed, 0, 0, "evaluation")])
        encoded = world.encode(frames)
        idle = idle_action(world.actions).to(encoded.device)
        self.seen = encoded[:, None].repeat_interleave(actor.history, dim=1)
        past = idle.expand(1, world.context - 1, *idle.shape)
        random = torch.Generator().manual_seed(derive_seed(seed, 0, 0, "film"))
        self.dream = world.dream(encoded[:, None].repeat_interleave(world.context, dim=1), past, random)
        self.random = random
        self.real, self.dreamt = [frames[0]], [self._draw(encoded)]
        self.actions: list[np.ndarray] = []
        self.rewards: list[tuple[float, float]] = []
        self.has_ended = self.dream_has_ended = False

    def _draw(self, encoded: Tensor) -> np.ndarray:
        return self.actor.world.draw(encoded)[0].cpu().numpy()

    def policy_action(self) -> np.ndarray:
        """What the policy does in the dream."""
        model, actor = self.actor.model, self.actor
        features = actor.world.features(self.seen, actor.sees)
        choice = model.choose(features, None if actor.greedy else self.random)
        return model.space.unscale(choice)[0].cpu().numpy()

    def take(self, action: np.ndarray) -> None:
        """One step in both; what has ended keeps its last frame."""
        outcome = self.dream.step(torch.as_tensor(np.array(action), device=self.seen.device)[None])
        self.seen = torch.cat([self.seen[:, 1:], outcome.encoded[:, None]], dim=1)
        after = self.env.step(np.array(action)[None])
        reward = 0.0 if self.has_ended else float(after.rewards[0])
        self.has_ended |= bool(after.terminated[0] | after.truncated[0])
        self.rewards.append((reward, 0.0 if self.dream_has_ended else float(outcome.rewards[0])))
        self.dreamt.append(self.dreamt[-1] if self.dream_has_ended else self._draw(outcome.encoded))
        self.dream_has_ended |= bool(outcome.goes_on[0] < 0.5)
        self.real.append(after.frames[0])
        self.actions.append(np.asarray(action))

    def film(self) -> Film:
        rewards = np.array(self.rewards, dtype=np.float32).reshape(-1, 2)
        return Film(np.stack(self.real), np.stack(self.dreamt), np.array(self.actions), rewards[:, 0], rewards[:, 1])


def follow(stage: Stage, steps: int, script: Sequence | np.ndarray | None = None) -> None:
    """At most `steps` steps of the policy in the dream, or of a script of actions, until both have ended."""
    for step in range(steps if script is None else min(steps, len(script))):
        stage.take(stage.policy_action() if script is None else np.asarray(script[step]))
        if stage.has_ended and stage.dream_has_ended:
            break


def film(env: BatchedEnv, actor: Actor, *, steps: int, seed: int) -> Film:
    """An episode of the policy."""
    stage = Stage(env, actor, seed)
    follow(stage, steps)
    return stage.film()
