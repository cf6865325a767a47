"""Is this latent plannable? Figures of a world and a cost that tell why plans would fail."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from jepa.data.episodes import Episodes
from jepa.envs.policies import StickyRandom
from jepa.envs.types import BatchedEnv, EnvTraits
from jepa.planning.costs import cost_at_rest
from jepa.planning.heads import windows_of
from jepa.planning.types import Cost
from jepa.planning.world import World
from jepa.reports.statistics import spearman

NUM_PAIRS, NUM_STEPS = 1000, 40
"""Pairs of a state and a goal; random steps from a start to the state."""
NUM_WINDOWS = 400
NUM_CANDIDATES = 64
HORIZONS = (1, 5, 10)


@torch.no_grad()
def plannability(world: World, costs: Mapping[str, Cost], env: BatchedEnv, data: Episodes | None) -> dict[str, float]:
    """Shares and correlations by name.

    `cost_correlation`: of the cost of being at a state with the length of the shortest path to the goal;
    `rollout_h*`: squared error of a prediction after so many steps over that of copying the last frame;
    `shuffled_ratio`: error with the actions of other windows over the error; `true_action_rank`: the share of random
    actions that explain the next state less well than the true one; `state_r2`: of the probe. All but the first are
    of held-out episodes, which neither the world nor its heads were fitted on, or of all if none are held out.
    """
    figures = {}
    traits = EnvTraits.of(env)
    if traits.task and traits.path_length and traits.render:
        figures["cost_correlation"] = cost_correlation(world, costs, traits)
    if data is not None:
        figures |= prediction(world, data)
    return figures


def cost_correlation(world: World, costs: Mapping[str, Cost], traits: EnvTraits) -> float:
    """Spearman correlation over states that random walks from the starts of tasks lead to, with the tasks' goals.

    States that have reached the goal, or never can, do not count.
    """
    assert traits.task
    assert traits.path_length
    assert traits.render
    tasks = [traits.task(10_000 + number) for number in range(NUM_PAIRS)]
    starts, goals = (np.stack(states) for states in zip(*tasks, strict=True))
    if traits.simulate:
        walk = StickyRandom()
        walk.begin(world.contract.actions, range(NUM_PAIRS), NUM_STEPS)
        for step in range(NUM_STEPS):
            starts = traits.simulate(starts, walk.act(step, starts, starts))
    lengths = traits.path_length(starts, goals)
    counts = (lengths > 0) & np.isfinite(lengths)
    starts, goals, lengths = starts[counts], goals[counts], lengths[counts]
    states, targets = (world.encode(traits.render(values)) for values in (starts, goals))
    values = [cost_at_rest(costs, world, state, target) for state, target in zip(states, targets, strict=True)]
    correlation = spearman(values, lengths)
    return 0.0 if math.isnan(correlation) else correlation


def prediction(world: World, data: Episodes) -> dict[str, float]:
    """Errors of rollouts from windows of held-out episodes."""
    history, block = world.history, world.contract.block
    longest = max(HORIZONS)
    frames, actions, simulator = windows(data, history, block, longest)
    states = world.encode(frames)  # [n, h + K, S, Z]
    figures: dict[str, float] = {}
    predicted = world.rollout(states[:, :history], actions)
    shuffled = world.rollout(states[:, :history], actions.roll(1, dims=0))
    future, last = states[:, history:], states[:, history - 1 : history]
    errors = {
        name: (values - future).square().mean(dim=(0, 2, 3))
        for name, values in (("model", predicted), ("shuffled", shuffled), ("copy", last))
    }
    for horizon in HORIZONS:
        if horizon <= errors["model"].shape[0]:
            figures[f"rollout_h{horizon}"] = (errors["model"][horizon - 1] / errors["copy"][horizon - 1]).item()
    figures["shuffled_ratio"] = (errors["shuffled"].mean() / errors["model"].mean()).item()
    figures["true_action_rank"] = true_action_rank(world, states, actions)
    if "probe" in world.heads and simulator.shape[-1]:
        read, simulator = world.heads["probe"](windows_of(states, history)), simulator[:, history - 1 :]
        residual, spread = (read - simulator).square().mean(dim=(0, 1)), simulator.flatten(0, 1).var(dim=0)
        varies = spread > 1e-6
        figures["state_r2"] = (1 - residual[varies] / spread[varies]).mean().item() if varies.any() else float("nan")
    return figures


def windows(data: Episodes, history: int, block: int, longest: int) -> tuple[np.ndarray, torch.Tensor, torch.Tensor]:
    """Frames [n, h + K, C, H, W], actions [n, h - 1 + K, ...], simulator states [n, h + K, S] of held-out episodes.

    K is at most `longest`, less where the episodes are shorter.
    """
    store, numbers = data.store, data.held_out_numbers or data.numbers
    longest = min(longest, max(int(store.lengths[n]) for n in numbers) // block - history + 1)
    span = (history + longest - 1) * block
    usable = [n for n in numbers if store.lengths[n] >= span]
    rng = np.random.default_rng(0)
    parts = []
    for number in rng.choice(usable, NUM_WINDOWS):
        first = int(rng.integers(int(store.lengths[number]) - span + 1))
        arrays = store.read(int(number), first, span + 1)
        shape = (span // block, *((block,) if block > 1 else ()), *arrays["actions"].shape[1:])
        parts.append((arrays["frames"][::block], arrays["actions"].reshape(shape), arrays["states"][::block]))
    frames, actions, states = (np.stack(part) for part in zip(*parts, strict=True))
    return frames, torch.from_numpy(actions), torch.from_numpy(states)


def true_action_rank(world: World, states: torch.Tensor, actions: torch.Tensor) -> float:
    """Mean share of random actions whose predicted next state is further from the true one than the true action's.

    Those that are as far count half, so that a world without actions has 0.5.
    """
    history, space = world.history, world.contract.actions
    random = torch.Generator().manual_seed(0)
    shares = []
    for row in range(min(100, len(states))):
        known, past = states[row, :history], actions[row, :history]
        count = NUM_CANDIDATES
        repeated = past.expand(count, *past.shape).clone()
        if space.is_discrete:
            repeated[1:, -1] = torch.randint(space.num_actions, repeated[1:, -1].shape, generator=random)
        else:
            low, high = torch.tensor(space.low), torch.tensor(space.high)
            repeated[1:, -1] = low + torch.rand(repeated[1:, -1].shape, generator=random) * (high - low)
        after = world.step(known.expand(count, *known.shape), repeated)
        errors = (after - states[row, history]).square().mean(dim=(1, 2))
        shares.append((errors[1:] > errors[0]).float().mean() + (errors[1:] == errors[0]).float().mean() / 2)
    return torch.stack(shares).mean().item()


def verdict(figures: Mapping[str, Any]) -> str:
    """A sentence on what stands in the way of planning, if anything does."""
    if figures.get("shuffled_ratio", 2) < 1.2:
        return "the actions hardly change what is predicted: collect more varied actions"
    if figures.get("rollout_h5", 0) > 0.8:
        return (
            "predictions are hardly better than copying the last frame: train longer, or raise regularizer and history"
        )
    if figures.get("cost_correlation", 1) < 0.7:
        return (
            "the cost rises and falls otherwise than the way that is left: a plan that only lowers it may stop at walls"
            "; planner=tree looks for ways around them"
        )
    if "cost_correlation" not in figures:  # the environment has no goals
        return "nothing stands in the way: actions matter, and predictions hold"
    return "nothing stands in the way: actions matter, predictions hold, and the cost falls along the way to the goal"
