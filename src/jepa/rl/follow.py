"""A policy that goes on in a world that was trained further: there it first learns to do what it did before.

The states of a world move while it is trained, and a policy that reads them would do something else in the next round.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import AdamW

from jepa.data.episode_store import EpisodeStore
from jepa.rl.actor_critic import ActorCritic, divergence
from jepa.rl.dreams import DreamWorld
from jepa.rl.policy import Actor
from jepa.rl.replay import remember
from jepa.seeding import generator

log = logging.getLogger(__name__)
MAX_FRAMES = 20_000
"""Remembered frames on which the policies are compared."""
STEPS, BATCH_SIZE, LR = 400, 512, 1e-3


def follow(model: ActorCritic, before: Actor, world: DreamWorld, store: EpisodeStore, *, seed: int, step: int) -> None:
    """Change the weights of `model`, which are those of the policy `before`, until it agrees with it in `world`.

    In remembered frames it has the actions and values that the policy `before` has in its own world (policy
    distillation, Rusu et al. 2016). It is a function of `seed` and `step`, the steps of the policy so far.
    """
    device = before.model.spread.device
    numbers = some_episodes(store.lengths.tolist(), MAX_FRAMES)
    old, new = (remember(one, store, numbers, device) for one in (before.world, world))
    random = generator(seed, step, 0, "follow")

    def compared(rows: Tensor) -> tuple[Tensor, Tensor]:
        """Features of the same frames in both worlds, [n, F] each"""
        pairs = ((before.world, old), (world, new))
        with torch.no_grad():
            known, seen = (one.features(memory.windows(rows, before.history)[0], before.sees) for one, memory in pairs)
        return known, seen

    model.standardise_by(torch.cat([compared(part)[1] for part in new.starts.split(BATCH_SIZE)]))
    learnt = [*model.actor.parameters(), *model.critic.parameters()]
    optimizer = AdamW(learnt, lr=LR, weight_decay=0.0)
    losses = []
    for number in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = LR * (1 - number / STEPS)
        loss = divergence(before.model, model, *compared(new.draw(BATCH_SIZE, random)))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    model.slow_critic.load_state_dict(model.critic.state_dict())
    first, last = losses[0].item(), torch.stack(losses[-STEPS // 10 :]).mean().item()
    log.info("the policy follows its world: divergence from what it did before %.3g, at first %.3g", last, first)


def some_episodes(lengths: Sequence[int], max_frames: int) -> Sequence[int]:
    """Numbers of evenly spaced episodes with about `max_frames` frames together, the newest among them."""
    stride = max(1, -(-(sum(lengths) + len(lengths)) // max_frames))
    return range((len(lengths) - 1) % stride, len(lengths), stride)
