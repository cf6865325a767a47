"""Everything that was experienced: episodes on disk, collected until they have so many steps, and their codes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor

from jepa.data.collect import rollouts
from jepa.data.episode_store import Episode, EpisodeStore, StoreFacts, append, writing
from jepa.envs.policies import BatchedPolicy
from jepa.envs.types import BatchedEnv, node_of
from jepa.parallel.bars import bar
from jepa.rl.dreams import DreamWorld
from jepa.seeding import derive_seed
from jepa.types import ActionSpace

GROUP = 25
"""Episodes that are collected together."""


def extend(
    folder: Path, *, env: BatchedEnv, policy: Callable[[], BatchedPolicy], num_steps: int, episode_steps: int,
    seed: int,
) -> EpisodeStore:  # fmt: skip
    """The store in `folder`, extended by episodes of the policy until it has exactly `num_steps` steps.

    Episode n depends on (seed, n) and the policy alone, and the last one is cut off where the steps are used up: a
    process that was killed goes on to the same store.
    Raises RunError if the folder holds other episodes.
    """
    facts = StoreFacts(
        frame_shape=env.frame_shape, actions=env.actions, state_names=env.state_names, env=node_of(env), seed=seed,
        steps=episode_steps, frame_skip=env.settings.get("frame_skip", 1),
    )  # fmt: skip
    with writing(folder, facts):
        store = EpisodeStore(folder)
        done = int(store.lengths.sum())
        actor = policy() if done < num_steps else None
        with bar(total=num_steps, initial=done, unit="step", desc="collect") as shown:
            while actor is not None and done < num_steps:
                count = min(GROUP, -(-(num_steps - done) // episode_steps))
                seeds = [derive_seed(seed, len(store) + n, 0, "episode") for n in range(count)]
                append(folder, cut(rollouts(env, actor, seeds, episode_steps), num_steps - done))
                store = EpisodeStore(folder)
                shown.update(int(store.lengths.sum()) - done)
                done = int(store.lengths.sum())
    return store


def cut(episodes: Sequence[Episode], num_steps: int) -> list[Episode]:
    """The first `num_steps` steps of the episodes, one after the other; the last episode may end earlier."""
    kept = []
    for episode in episodes:
        count = min(len(episode.actions), num_steps)
        if count:
            rows = {name: getattr(episode, name)[: count + (name in ("frames", "states"))] for name in Episode._fields}
            kept.append(Episode(**rows))
        num_steps -= count
    return kept


class Memory(NamedTuple):
    """Encoded frames of some episodes, one after the other; N frames."""

    encoded: Tensor
    """[N, *E]"""
    firsts: Tensor
    """long [N]: index of the first frame of the episode that each frame belongs to"""
    actions: Tensor
    """[N, A] or long [N]: of the environment, after each frame; idle after the last of an episode"""
    starts: Tensor
    """long: frames from which a dream may begin, all but the last of an episode"""
    idle: Tensor
    """[A] or scalar: stands for the actions before the first"""

    def windows(self, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The last `count` frames up to each of the `rows` [B], and the actions between them.

        [B, count, *E], [B, count - 1, ...]. At the start of an episode its first frame is repeated.
        """
        places = rows[:, None] + torch.arange(1 - count, 1, device=rows.device)
        first = self.firsts[rows][:, None]
        actions, is_before = self.actions[places[:, :-1].clamp(min=0)], places[:, :-1] < first
        actions[is_before] = self.idle
        return self.encoded[torch.maximum(places, first)], actions

    def draw(self, count: int, random: Generator) -> Tensor:
        """long [count]: starts, each as likely as any other"""
        picks = torch.randint(len(self.starts), (count,), generator=random, device=random.device)
        return self.starts[picks.to(self.starts.device)]


def idle_action(space: ActionSpace) -> Tensor:
    """The first of discrete actions, the middle of continuous ones."""
    if space.is_discrete:
        return torch.tensor(0)
    return (torch.tensor(space.low) + torch.tensor(space.high)) / 2


def remember(world: DreamWorld, store: EpisodeStore, numbers: Sequence[int], device: torch.device) -> Memory:
    """The encoded frames of these episodes."""
    names = ("frames", "actions")
    read = (store.read(number, names=names) for number in bar(numbers, desc="encode", unit="episode"))
    return remembered(world, ((arrays["frames"], arrays["actions"]) for arrays in read), device)


def remembered(world: DreamWorld, episodes: Iterable[tuple[np.ndarray, np.ndarray]], device: torch.device) -> Memory:
    """The encoded frames of episodes, given as frames and actions."""
    idle, parts, firsts, starts, total = idle_action(world.actions), [], [], [], 0
    for frames, actions in episodes:
        steps = len(actions)
        taken = torch.from_numpy(np.array(actions))
        acted = torch.cat([taken, idle[None].to(taken.dtype)])
        parts.append((world.encode(np.ascontiguousarray(frames)), acted))
        firsts.append(torch.full((steps + 1,), total))
        starts.append(torch.arange(total, total + steps))
        total += steps + 1
    encoded, actions = (torch.cat(part) for part in zip(*parts, strict=True))
    columns = (encoded, torch.cat(firsts), actions, torch.cat(starts), idle.to(actions.dtype))
    return Memory(*(column.to(device) for column in columns))


def first_frames(world: DreamWorld, episodes: list[Episode], device: torch.device) -> Memory:
    """A memory of the first frame of each episode."""
    encoded = world.encode(np.stack([one.frames[0] for one in episodes]))
    rows, idle = torch.arange(len(encoded)), idle_action(world.actions)
    actions = idle.expand(len(encoded), *idle.shape)
    return Memory(*(column.to(device) for column in (encoded, rows, actions, rows, idle)))
