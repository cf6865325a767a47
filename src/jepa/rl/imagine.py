"""Steps of a policy in a dreamt world."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from jepa.rl.actor_critic import ActorCritic, DreamtSteps
from jepa.rl.dreams import DreamWorld
from jepa.rl.replay import Memory


@torch.no_grad()
def imagine(
    world: DreamWorld, model: ActorCritic, memory: Memory, rows: Tensor, *, horizon: int, history: int, sees: str,
    random: Generator | None,
) -> DreamtSteps:  # fmt: skip
    """`horizon` steps after the remembered frames `rows` [B].

    Actions and frames are drawn with `random`, else the likeliest are taken.
    """
    seen, _ = memory.windows(rows, history)
    dream = world.dream(*memory.windows(rows, world.context), random)
    features, choices, outcomes = [world.features(seen, sees)], [], []
    for _ in range(horizon):
        choices.append(model.choose(features[-1], random))
        outcomes.append(dream.step(model.space.unscale(choices[-1])))
        seen = torch.cat([seen[:, 1:], outcomes[-1].encoded[:, None]], dim=1)
        features.append(world.features(seen, sees))
    rewards, goes_on = (torch.stack([getattr(one, name) for one in outcomes]) for name in ("rewards", "goes_on"))
    return DreamtSteps(torch.stack(features), torch.stack(choices), rewards, goes_on)
