"""A trained policy: acts in environments that are stepped together, or in a loop of gymnasium."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jepa.config.files import as_mapping
from jepa.errors import ConfigError
from jepa.planning.world import load_built
from jepa.rl.actor_critic import ActorCritic
from jepa.rl.dreams import DreamWorld, load_dream_world
from jepa.runs.checkpoint import CheckpointError, find, load_model, read_state
from jepa.seeding import generator
from jepa.types import ActionSpace, PositiveInt, Share

POLICY_FIELDS = {"num_features": PositiveInt, "history": PositiveInt, "sees": str, "world": str}
"""Fields of `policy` in state.json."""


class Actor:
    """Policy of episodes that are stepped together, as those for collecting.

    Actions are drawn, each from a generator of its own episode and step; a share `explore` of them is uniform. With
    `greedy` the likeliest ones are taken.
    """

    def __init__(
        self, world: DreamWorld, model: ActorCritic, *, history: int, sees: str, explore: Share = 0.0,
        greedy: bool = False,
    ) -> None:  # fmt: skip
        self.world, self.model, self.history, self.sees = world, model, history, sees
        self.explore, self.greedy = explore, greedy
        self.settings: Mapping[str, Any] = {}

    def begin(self, space: ActionSpace, seeds: Sequence[int], num_steps: int) -> None:
        if space != self.model.space:
            raise ConfigError([f"policy: it was trained for {self.model.space}, the environment has {space}"])
        self.seeds = list(seeds)
        self.seen: Tensor | None = None

    @torch.no_grad()
    def act(self, step: int, frames: np.ndarray, states: np.ndarray) -> np.ndarray:
        encoded = self.world.encode(np.ascontiguousarray(frames))[:, None]
        self.seen = (
            encoded.repeat_interleave(self.history, 1)
            if self.seen is None
            else torch.cat([self.seen[:, 1:], encoded], 1)
        )
        features = self.world.features(self.seen, self.sees)
        if self.greedy:
            return self.model.space.unscale(self.model.choose(features, None)).cpu().numpy()
        rows = zip(self.seeds, features, strict=True)
        return self.model.space.unscale(torch.stack([self._draw(step, seed, row) for seed, row in rows])).cpu().numpy()

    def _draw(self, step: int, seed: int, features: Tensor) -> Tensor:
        """[F] -> a choice, [A] or a scalar"""
        random = generator(seed, step, 0, "act")
        is_random = torch.rand((), generator=random) < self.explore
        choice = self.model.choose(features[None], random)[0]
        if not is_random:
            return choice
        if self.model.space.is_discrete:
            return torch.randint(self.model.space.num_actions, (), generator=random).to(choice.device)
        return (2 * torch.rand(choice.shape, generator=random) - 1).to(choice.device)


class Policy:
    """A trained policy in a loop of gymnasium: `reset()`, then `act(picture)` for every rendered picture."""

    def __init__(self, actor: Actor, seed: int = 0) -> None:
        self.actor, self.seed = actor, seed
        self.reset()

    @property
    def frame_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the pictures that the world was trained on."""
        return self.actor.world.contract.frame_shape

    def reset(self) -> None:
        """Begin an episode."""
        self.actor.begin(self.actor.model.space, [self.seed], 0)
        self.step = 0

    def act(self, picture: np.ndarray) -> Any:
        """uint8 [H, W, C] or [C, H, W] -> an action of the environment. Raises ValueError for another size."""
        frame = self.actor.world.contract.channels_first(picture)
        action = self.actor.act(self.step, frame[None], np.zeros((1, 0)))[0]
        self.step += 1
        return int(action) if self.actor.model.space.is_discrete else action


class Trained(Actor):
    """The policy of a run of jepa-rl, for collecting."""

    def __init__(self, *, run: str, explore: Share = 0.0, greedy: bool = False) -> None:
        actor = load_actor(run)
        super().__init__(
            actor.world, actor.model, history=actor.history, sees=actor.sees, explore=explore, greedy=greedy
        )
        self.settings = {"run": run, "explore": explore, "greedy": greedy}


def load_policy(path_or_name: str | os.PathLike, *, greedy: bool = True) -> Policy:
    """The policy of a run folder of jepa-rl. Raises CheckpointError if there is none."""
    actor = load_actor(path_or_name)
    actor.greedy = greedy
    return Policy(actor)


def load_actor(path_or_name: str | os.PathLike, *, dreams: bool = False) -> Actor:
    """The policy of a run folder, which draws its actions, with its world, in which it can dream if asked for."""
    checkpoint = find(Path(path_or_name).expanduser())
    values = read_state(checkpoint).get("policy")
    if not isinstance(values, dict):
        raise CheckpointError(f"{checkpoint} holds no policy; train one with jepa-rl")
    as_mapping(values, f"{checkpoint / 'state.json'}: policy", POLICY_FIELDS)
    world = load_dream_world(checkpoint.parent.parent / "world" / "checkpoints" / values["world"], dreams=dreams)
    build = partial(ActorCritic, num_features=values["num_features"], space=world.actions)
    model = load_built(build, load_model(checkpoint), f"{checkpoint}", {})
    return Actor(world, model.eval().requires_grad_(False), history=values["history"], sees=values["sees"])
