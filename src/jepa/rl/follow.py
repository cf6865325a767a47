"""A policy that goes on in a world that was trained further: there it first learns to do what it did before.

The states of a world move while it is trained, and a policy that reads them would do something else in the next round.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from jepa.data.episode_store import EpisodeStore
from jepa.planning.heads import fit
from jepa.planning.world import ROWS
from jepa.rl.actor_critic import ActorCritic, divergence
from jepa.rl.dreams import DreamWorld
from jepa.rl.policy import Actor
from jepa.rl.replay import Memory, remember
from jepa.seeding import generator

log = logging.getLogger(__name__)
MAX_FRAMES = 20_000
"""Remembered frames on which the policies are compared."""
STEPS = 400


def follow(
    model: ActorCritic, before: Actor, world: DreamWorld, memory: Memory, store: EpisodeStore, *, seed: int, step: int
) -> None:
    """Change the weights of `model`, which are those of the policy `before`, until it agrees with it in `world`.

    In remembered frames it then has the actions and values that `before` has in its own world (policy distillation,
    Rusu et al. 2016). `memory` holds all episodes of the store, encoded by `world`. The result is a function of `seed`
    and `step`, the steps of the policy so far.
    """
    numbers = some_episodes(store.lengths.tolist(), MAX_FRAMES)
    compared = remember(before.world, store, numbers, memory.encoded.device)
    known = features_of(before.world, before, compared, compared.starts)
    firsts = np.cumsum([0, *store.lengths + 1])[numbers]
    is_compared = torch.isin(memory.firsts[memory.starts], torch.from_numpy(firsts).to(memory.firsts.device))
    seen = features_of(world, before, memory, memory.starts[is_compared])
    model.standardise_by(seen)

    def loss(rows: Tensor) -> Tensor:
        return divergence(before.model, model, known[rows], seen[rows])

    with torch.no_grad():
        first = loss(torch.arange(len(seen))).item()
    last = fit(model, loss, torch.arange(len(seen)), STEPS, generator(seed, step, 0, "follow"))
    model.slow_critic.load_state_dict(model.critic.state_dict())
    log.info("the policy follows its world: divergence from what it did before %.3g, at first %.3g", last, first)


@torch.no_grad()
def features_of(world: DreamWorld, actor: Actor, memory: Memory, starts: Tensor) -> Tensor:
    """What the policy reads at these frames of a memory of `world`: [n, F]"""
    windows = (memory.windows(rows, actor.history)[0] for rows in starts.split(ROWS))
    return torch.cat([world.features(seen, actor.sees) for seen in windows])


def some_episodes(lengths: Sequence[int], max_frames: int) -> Sequence[int]:
    """Numbers of evenly spaced episodes with about `max_frames` frames together, the newest among them."""
    stride = max(1, -(-(sum(lengths) + len(lengths)) // max_frames))
    return range((len(lengths) - 1) % stride, len(lengths), stride)
