"""Collect episodes of an environment into a store; the same call again goes on where it was."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jepa.data.episode_store import Episode, EpisodeStore, StoreFacts, append, writing
from jepa.envs.policies import BatchedPolicy, PolicyTraits
from jepa.envs.types import BatchedEnv, EnvTraits, check_actions, node_of
from jepa.parallel.bars import bar
from jepa.seeding import derive_seed

GROUP_BYTES = 1 << 29
"""Largest size of the frames of a group, which lie in memory until it is written."""


def collect(
    folder: Path, *, env: BatchedEnv, policy: BatchedPolicy, num_episodes: int, num_steps: int, seed: int
) -> EpisodeStore:
    """A store with at least `num_episodes` episodes of at most `num_steps` steps.

    Episode n depends on (seed, n) alone. A process that is killed loses the group of episodes that it was collecting.
    Raises RunError if the folder holds something else, episodes that were collected otherwise, or cannot be written.
    """
    facts = StoreFacts(
        frame_shape=env.frame_shape, actions=env.actions, state_names=env.state_names, env=node_of(env),
        policy=node_of(policy), seed=seed, steps=num_steps, frame_skip=env.settings.get("frame_skip", 1),
    )  # fmt: skip
    size = _group_size(env, num_steps)
    with writing(folder, facts):
        done = len(EpisodeStore(folder))
        total, initial = num_episodes * num_steps, done * num_steps
        with bar(total=total, initial=initial, unit="frame", desc="collect") as shown:
            while done < num_episodes:
                numbers = range(done, min(done + size - done % size, num_episodes))
                seeds = [derive_seed(seed, n, 0, "episode") for n in numbers]
                append(folder, rollouts(env, policy, seeds, num_steps, shown))
                done = numbers.stop
                shown.update(done * num_steps - shown.n)  # episodes may end early
    return EpisodeStore(folder)


def _group_size(env: BatchedEnv, num_steps: int) -> int:
    """Number of episodes that are collected together; it depends on nothing that may differ when a store goes on."""
    bytes_of_episode = math.prod(env.frame_shape) * (num_steps + 1)
    return max(1, min(EnvTraits.of(env).group_size, GROUP_BYTES // bytes_of_episode))


def rollouts(
    env: BatchedEnv, policy: BatchedPolicy, seeds: Sequence[int], num_steps: int, shown: Any = None
) -> list[Episode]:
    """One episode for each seed, all stepped together; each ends after `num_steps` steps or when its world ends."""
    tasks = PolicyTraits.of(policy).tasks
    frames, states = env.reset(seeds, *(tasks(env, seeds) if tasks else ()))
    policy.begin(env.actions, seeds, num_steps)
    history = [(frames, states)]
    transitions = []
    has_ended = np.zeros(len(seeds), dtype=bool)
    for step in range(num_steps):
        actions = check_actions(env.actions, policy.act(step, *history[-1]), len(seeds))
        after = env.step(actions)
        transitions.append((actions, after.rewards, after.terminated, after.truncated))
        history.append((after.frames, after.states))
        has_ended |= after.terminated | after.truncated
        if shown is not None:
            shown.update(len(seeds))
        if has_ended.all():
            break
    frames, states = (np.stack(column, axis=1) for column in zip(*history, strict=True))  # [B, T + 1, ...]
    columns = [np.stack(column, axis=1) for column in zip(*transitions, strict=True)]  # [B, T, ...]
    ends = columns[2] | columns[3]
    lengths = np.where(has_ended, ends.argmax(axis=1) + 1, len(transitions))
    return [
        Episode(frames[n, : length + 1], states[n, : length + 1], *(column[n, :length] for column in columns))
        for n, length in enumerate(lengths)
    ]
