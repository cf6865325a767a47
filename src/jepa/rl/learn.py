"""Trains a policy in a dreamt world; a step is a pure function of its weights, the memory and its number."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
from torch.optim import AdamW

from jepa.config import RLConfig
from jepa.parallel.bars import bar
from jepa.parallel.signals import Interrupt
from jepa.rl.actor_critic import ActorCritic, loss
from jepa.rl.dreams import DreamWorld
from jepa.rl.imagine import imagine
from jepa.rl.replay import Memory
from jepa.seeding import derive_seed, generator

NUM_STANDARDISED = 4096
"""Frames whose features give mean and standard deviation."""


def make_learner(config: RLConfig, world: DreamWorld, device: torch.device) -> tuple[ActorCritic, AdamW]:
    """Actor and critic with initial weights, and their optimizer."""
    sample = world.encode(torch.zeros(1, *world.contract.frame_shape, dtype=torch.uint8))  # on the device
    num_features = world.features(sample[:, None].repeat_interleave(config.history, dim=1), config.sees).shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, 0, 0, "policy"))
        model = ActorCritic(num_features=num_features, space=world.actions)
    model = model.to(device)
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return model, AdamW(learnt, lr=config.lr, weight_decay=0.0)


def standardise(config: RLConfig, world: DreamWorld, model: ActorCritic, memory: Memory) -> None:
    """Scale the features by those of remembered frames, before the first step."""
    rows = memory.draw(NUM_STANDARDISED, generator(config.seed, 0, 0, "standardise"))
    parts = [world.features(memory.windows(part, config.history)[0], config.sees) for part in rows.split(512)]
    model.standardise_by(torch.cat(parts))


def learn(
    config: RLConfig, world: DreamWorld, memory: Memory, model: ActorCritic, optimizer: AdamW, *, first_step: int,
    end_step: int, interrupt: Interrupt, log: Callable[[int, Mapping[str, float]], None], save: Callable[[int], None],
) -> int:  # fmt: skip
    """Steps from `first_step` to `end_step` or an interrupt; returns the number of finished steps.

    The state is saved at the end and `save_every` steps.
    """
    if first_step == 0:
        standardise(config, world, model, memory)
    every = config.save_every or max(1, (end_step - first_step) // 10)
    kept, begun = [], time.perf_counter()
    with bar(total=end_step, initial=first_step, desc="policy", unit="step") as shown:
        for step in range(first_step, end_step):
            kept.append(one_step(config, world, memory, model, optimizer, step))
            done = step + 1
            if done % config.log_every == 0 or done == end_step:
                means = {f"policy/{name}": mean_of([row[name] for row in kept]) for name in kept[0]}
                speed = len(kept) * config.batch_size * config.horizon / (time.perf_counter() - begun)
                log(done, means | {"perf/imagined_per_s": speed})
                shown.update(done - shown.n)
                shown.set_postfix({name: f"{means[f'policy/{name}']:.3g}" for name in ("return", "entropy")})
                kept, begun = [], time.perf_counter()
            if done % every == 0 or done == end_step or interrupt.is_requested():
                save(done)
            if interrupt.is_requested():
                return done
    return end_step


def mean_of(values: list[torch.Tensor]) -> float:
    return torch.stack(values).mean().item()


def one_step(
    config: RLConfig, world: DreamWorld, memory: Memory, model: ActorCritic, optimizer: AdamW, step: int
) -> dict[str, torch.Tensor]:
    """Dream, and one step of the optimizer; returns metrics."""
    random = torch.Generator(memory.encoded.device).manual_seed(derive_seed(config.seed, step, 0, "dream"))
    rows = memory.draw(config.batch_size, random)
    imagined = imagine(
        world, model, memory, rows, horizon=config.horizon, history=config.history, sees=config.sees, random=random
    )
    total, metrics = loss(model, imagined, gamma=config.gamma, lam=config.lam, entropy=config.entropy)
    optimizer.zero_grad(set_to_none=True)
    total.backward()
    learnt = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    metrics["grad_norm"] = torch.nn.utils.clip_grad_norm_(learnt, config.clip_grad)
    optimizer.step()
    model.after_step()
    return metrics
