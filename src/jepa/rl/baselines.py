"""Model-free baselines: PPO of Stable-Baselines3, `pip install 'jepa-train[rl]'`, on frames or on frozen features."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from jepa.config import build_with
from jepa.envs.types import BatchedEnv
from jepa.exporters.format import require
from jepa.rl.features import FeaturesExtractor
from jepa.seeding import derive_seed
from jepa.types import ActionSpace

gymnasium, sb3 = (require(name, "rl") for name in ("gymnasium", "stable_baselines3"))
callbacks = require("stable_baselines3.common.callbacks", "rl")

ROLLOUT = 256
"""Steps between two updates, about."""
SETTINGS = {
    "learning_rate": 2.5e-4, "batch_size": 64, "n_epochs": 10, "gamma": 0.99, "gae_lambda": 0.95, "clip_range": 0.2,
    "ent_coef": 0.0,
}  # fmt: skip
"""Of RL Baselines3 Zoo for MiniGrid (hyperparams/ppo.yml), which has eight environments with rollouts of 128 steps."""
SMALLEST = 36
"""Pixels on each side of a frame that the convolutions of Mnih et al. (Nature 518, 2015) need; they are "CnnPolicy"."""


def ppo_policy(
    env_node: Mapping[str, Any], *, steps: int, seed: int, episode_steps: int, encoder: str | os.PathLike | None = None
) -> PPOPolicy:
    """PPO after exactly `steps` steps of the environment of `env_node`, in episodes of at most `episode_steps`.

    It sees frames, or with the path of a run as `encoder` the tokens of its frozen encoder. Same seed, same policy.
    """
    env = build_with(dict(env_node))
    factor = 1 if encoder else math.ceil(SMALLEST / min(*env.frame_shape[1:], SMALLEST))
    kwargs = {"encoder": encoder, "pooling": "flatten"}
    features = {"features_extractor_class": FeaturesExtractor, "features_extractor_kwargs": kwargs}
    num_rollouts = max(1, round(steps / ROLLOUT))
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*mini-batch", category=UserWarning)  # a smaller one does no harm
        model = sb3.PPO(
            "CnnPolicy", FrameEnv(env, seed=seed, episode_steps=episode_steps, factor=factor), seed=seed,
            n_steps=steps // num_rollouts, policy_kwargs=features if encoder else None, **SETTINGS,
        )  # fmt: skip
        model.learn(steps, callback=StopAt(steps))
    env.close()
    settings = {"steps": steps, "seed": seed, "episode_steps": episode_steps, "encoder": encoder and os.fspath(encoder)}
    return PPOPolicy(model, factor, settings)


class PPOPolicy:
    """Draws actions from the distributions that PPO has learned; what is drawn depends on the seed of the episode."""

    def __init__(self, model: Any, factor: int, settings: Mapping[str, Any]) -> None:
        self.model, self.factor, self.settings = model, factor, settings

    def begin(self, space: ActionSpace, seeds: Sequence[int], num_steps: int) -> None:
        self.space = space
        generators = [np.random.default_rng([seed, 4]) for seed in seeds]
        if space.is_discrete:
            self.noise = np.stack([generator.random(num_steps) for generator in generators])  # [B, T]
        else:
            shape = (num_steps, *space.shape)
            self.noise = np.stack([generator.standard_normal(shape) for generator in generators])  # [B, T, A]

    @torch.no_grad()
    def act(self, step: int, frames: np.ndarray, states: np.ndarray) -> np.ndarray:
        policy, noise = self.model.policy, self.noise[:, step]
        policy.set_training_mode(False)
        observations, _ = policy.obs_to_tensor(enlarged(frames, self.factor))
        chances = policy.get_distribution(observations).distribution
        if self.space.is_discrete:
            bounds = chances.probs.double().cumsum(dim=1).cpu().numpy()[:, :-1]
            return (noise[:, None] > bounds).sum(axis=1)
        drawn = chances.mean.cpu().numpy() + chances.stddev.cpu().numpy() * noise
        return self.space.unscale(drawn.astype(np.float32))


class FrameEnv(gymnasium.Env):
    """One environment as gymnasium's: frames uint8 [C, H, W], and actions from -1 to 1 if they are continuous."""

    def __init__(self, env: BatchedEnv, *, seed: int, episode_steps: int, factor: int = 1) -> None:
        self.env, self.seed, self.episode_steps, self.factor = env, seed, episode_steps, factor
        self.num_episodes = self.num_steps = 0
        channels, height, width = env.frame_shape
        frame_shape = (channels, factor * height, factor * width)
        self.observation_space = gymnasium.spaces.Box(0, 255, frame_shape, dtype=np.uint8)
        if env.actions.is_discrete:
            self.action_space = gymnasium.spaces.Discrete(env.actions.num_actions)
        else:
            self.action_space = gymnasium.spaces.Box(-1, 1, env.actions.shape, dtype=np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Episode n depends on the seed of the constructor and on n alone."""
        frames, _ = self.env.reset([derive_seed(self.seed, self.num_episodes, 0, "ppo")])
        self.num_episodes, self.num_steps = self.num_episodes + 1, 0
        return enlarged(frames, self.factor)[0], {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        after = self.env.step(self.env.actions.unscale(np.asarray(action)[None]))
        self.num_steps += 1
        is_cut = bool(after.truncated[0]) or self.num_steps == self.episode_steps
        frame = enlarged(after.frames, self.factor)[0]
        return frame, float(after.rewards[0]), bool(after.terminated[0]), is_cut, {}


class StopAt(callbacks.BaseCallback):
    """Ends the learning after `steps` steps, also within a rollout, which is then not learned from."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    def _on_step(self) -> bool:
        return self.num_timesteps < self.steps


def enlarged(frames: np.ndarray, factor: int) -> np.ndarray:
    """[B, C, H, W] -> [B, C, factor * H, factor * W], each pixel repeated"""
    return frames.repeat(factor, axis=2).repeat(factor, axis=3)
