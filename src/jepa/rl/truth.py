"""What a dreamt world gets right: frames, rewards and returns, measured on episodes that it was not trained on.

Returns in a dream look good in runs that fail: a policy finds what the world gets wrong. These figures tell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from jepa.data.episode_store import Episode, EpisodeStore
from jepa.rl.dreams import DreamWorld, StepOutcome
from jepa.rl.imagine import imagine
from jepa.rl.policy import Actor
from jepa.rl.replay import Memory, remembered
from jepa.rl.returns import still_alive
from jepa.seeding import generator

MAX_FRAMES = 4000
"""Frames that are compared."""
MAX_DREAM = 50
"""Longest dream whose return is compared with the real one."""
HALF = 0.5
"""Share of a usual reward above which one counts as expected."""
DISTINCT, FALSE, GAP = 0.99, 0.01, 0.25
"""Bounds of the verdict: least share of distinct frames, largest share of false rewards, largest gap between imagined
and real returns, as a share of the larger of both."""


def truth(world: DreamWorld, store: EpisodeStore, numbers: Sequence[int], memory: Memory) -> dict[str, float]:
    """Figures of the transitions of these episodes, which `memory` holds in the same order.

    `distinct`: of tokens, different encodings over different frames. `exact_frames`: share of frames after one dreamt
    step that are the right one: of tokens all codes are right, of latents no other frame of the episodes is nearer.
    `reward_recall`: share of the rewards that are expected by at least half; `false_rewards`: share of the transitions
    without a reward for which half of a usual one or more is expected.
    """
    starts, outcome = _one_step(world, memory)
    rewards = torch.from_numpy(np.concatenate([store.read(n, names=("rewards",))["rewards"] for n in numbers]))
    frames = np.concatenate([store.read(n, names=("frames",))["frames"] for n in numbers])
    same = _identities(frames)
    figures = _reward_figures(outcome.rewards.cpu(), rewards[: len(starts)])
    if memory.encoded.dtype == torch.long:
        num_distinct = len(torch.unique(memory.encoded.flatten(1), dim=0))
        figures["distinct"] = num_distinct / (int(same.max()) + 1)
        right = (outcome.encoded == memory.encoded[starts + 1]).flatten(1).all(dim=1)
        return figures | {"exact_frames": right.float().mean().item()}
    nearest = torch.cdist(outcome.encoded.flatten(1), memory.encoded.flatten(1)).argmin(dim=1).cpu()
    right = same[nearest] == same[starts.cpu() + 1]
    return figures | {"exact_frames": right.float().mean().item()}


def _one_step(world: DreamWorld, memory: Memory) -> tuple[Tensor, StepOutcome]:
    """The first frames from which a dream may begin, long [n], and what is dreamt after them and their actions."""
    starts = memory.starts[:MAX_FRAMES]
    dream = world.dream(*memory.windows(starts, world.context), None)
    return starts, dream.step(memory.actions[starts])


def own_rewards(world: DreamWorld, episodes: Sequence[Episode], device: torch.device) -> dict[str, float]:
    """`reward_size`: the share of the rewards of these episodes that single dreamt steps from their frames expect.

    Of sums of absolute values, over episodes with MAX_FRAMES transitions or somewhat more; left out without rewards.
    """
    until = int(np.searchsorted(np.cumsum([len(one.actions) for one in episodes]), MAX_FRAMES)) + 1
    kept = episodes[:until]
    starts, outcome = _one_step(world, remembered(world, ((one.frames, one.actions) for one in kept), device))
    rewards = torch.from_numpy(np.concatenate([one.rewards for one in kept]))[: len(starts)]
    total = rewards.abs().sum().item()
    if total == 0:
        return {}
    return {"reward_size": (outcome.rewards.cpu() * rewards.sign()).sum().item() / total}


def _identities(frames: np.ndarray) -> Tensor:
    """uint8 [n, C, H, W] -> long [n]: the same number for equal frames"""
    numbers: dict[bytes, int] = {}
    return torch.tensor([numbers.setdefault(frame.tobytes(), len(numbers)) for frame in frames])


def _reward_figures(expected: Tensor, rewards: Tensor) -> dict[str, float]:
    """[n], [n]; a figure is left out where there is nothing that it could be measured on."""
    is_rewarded = rewards.abs() > 1e-6
    figures = {"reward_error": (expected - rewards).abs().mean().item()}
    if is_rewarded.any():
        told = expected * rewards.sign() > HALF * rewards.abs()
        figures["reward_recall"] = told[is_rewarded].float().mean().item()
        usual = rewards[is_rewarded].abs().mean()
        if not is_rewarded.all():
            figures["false_rewards"] = (expected.abs() > HALF * usual)[~is_rewarded].float().mean().item()
    return figures


def compared_returns(
    actor: Actor, episodes: Sequence[Episode], memory: Memory, *, seed: int, steps: int
) -> dict[str, float]:
    """Mean return of dreams that begin with the first frames of these episodes, and of the episodes themselves.

    Both over `steps` steps, or MAX_DREAM if that is less. `memory` holds the first frames.
    """
    steps = min(steps, MAX_DREAM)
    random = None if actor.greedy else generator(seed, 0, 0, "truth")
    imagined = imagine(
        actor.world, actor.model, memory, memory.starts, horizon=steps, history=actor.history,
        sees=actor.sees, random=random,
    )  # fmt: skip
    alive = still_alive(imagined.goes_on)
    real = np.mean([one.rewards[:steps].sum() for one in episodes])
    return {"imagined_return": (alive * imagined.rewards).sum(dim=0).mean().item(), "real_return": float(real)}


def doubts(figures: Mapping[str, float]) -> list[str]:
    """Why the imagined return is not to be trusted; empty if nothing speaks against it."""
    reasons = []
    if figures.get("distinct", 1) < DISTINCT:
        reasons.append(f"only {figures['distinct']:.1%} of different frames have different tokens")
    if figures.get("false_rewards", 0) > FALSE:
        reasons.append(f"{figures['false_rewards']:.1%} of the steps without a reward promise one")
    if figures.get("reward_recall", 1) < HALF:
        reasons.append(f"{figures['reward_recall']:.0%} of the rewards are expected")
    imagined, real = figures["imagined_return"], figures["real_return"]
    if abs(imagined - real) > GAP * max(abs(imagined), abs(real)):
        reasons.append(f"dreams return {imagined:.3g}, episodes {real:.3g}{_advice(figures)}")
    return reasons


def _advice(figures: Mapping[str, float]) -> str:
    """What speaks for one cause of the gap between imagined and real returns; empty if nothing does."""
    if figures["imagined_return"] > figures["real_return"]:
        return " (a smaller horizon leaves the policy fewer errors of the world to find)"
    if figures.get("reward_size", 1) < 1 - GAP:
        return (
            f" (single steps expect {figures['reward_size']:.0%} of the rewards that the policy's episodes brought: "
            "few like them were collected, or they depend on what frames do not show, as the time)"
        )
    return ""
