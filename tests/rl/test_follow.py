"""A policy whose world has changed under it does what it did before, and learns from there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from corridor import SIDE, Corridor

from jepa.envs.policies import Random
from jepa.rl.actor_critic import ActorCritic, divergence
from jepa.rl.dreams import DreamWorld
from jepa.rl.follow import follow, some_episodes
from jepa.rl.policy import Actor
from jepa.rl.replay import extend, remember
from jepa.types import ActionSpace


class Projection(DreamWorld):
    """Encodes a frame as the columns of its first row, mixed by a matrix that differs from world to world."""

    def __init__(self, seed: int, space: ActionSpace) -> None:
        super().__init__()
        self.space, self.mix = space, torch.randn(SIDE, 6, generator=torch.Generator().manual_seed(seed))

    @property
    def actions(self) -> ActionSpace:
        return self.space

    def encode(self, frames: Any) -> torch.Tensor:
        return torch.as_tensor(np.array(frames))[:, 0, 0].float() / 255 @ self.mix

    def vectors(self, encoded: torch.Tensor) -> torch.Tensor:
        return encoded


@pytest.mark.parametrize(
    ("history", "continuous", "max_frames"), [(1, False, 20_000), (2, True, 20_000), (2, False, 150)]
)
def test_a_policy_does_in_a_changed_world_what_it_did_before(
    history: int, continuous: bool, max_frames: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jepa.rl.follow.STEPS", 200)
    monkeypatch.setattr("jepa.rl.follow.MAX_FRAMES", max_frames)
    env = Corridor(continuous=continuous)
    store = extend(tmp_path, env=env, policy=Random, num_steps=300, episode_steps=9, seed=0)
    before, world = Projection(0, env.actions), Projection(1, env.actions)
    torch.manual_seed(0)
    known = ActorCritic(num_features=6 * history, space=env.actions)
    for head in (known.actor, known.critic):
        torch.nn.init.normal_(head.layers[-1].weight, std=0.1)  # pyright: ignore
    memories = [remember(one, store, range(len(store)), torch.device("cpu")) for one in (before, world)]
    rows = memories[0].starts
    features = [
        one.features(memory.windows(rows, history)[0], "states")
        for one, memory in zip((before, world), memories, strict=True)
    ]
    known.standardise_by(features[0])
    followers, at_first = [], divergence(known, known, *features).item()
    for _ in range(2):
        model = ActorCritic(num_features=6 * history, space=env.actions)
        model.load_state_dict(known.state_dict())
        follow(model, Actor(before, known, history=history, sees="states"), world, memories[1], store, seed=0, step=7)
        followers.append(model)
    assert divergence(known, followers[0], *features) < 0.15 * at_first
    pairs = zip(followers[0].state_dict().values(), followers[1].state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    value = followers[0].code.mean(followers[0].slow_critic(features[1]))
    wanted = known.code.mean(known.critic(features[0]))
    assert (value - wanted).abs().mean() < 0.1 * wanted.std()


def test_episodes_are_evenly_spaced_and_the_newest_is_among_them() -> None:
    assert list(some_episodes([9] * 10, 100)) == list(range(10))
    assert list(some_episodes([9] * 10, 50)) == [1, 3, 5, 7, 9]
    assert list(some_episodes([9], 3)) == [0]
