"""Collect episodes of an environment into a store; the same call again goes on where it was."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from jepa.data.episode_store import Episode, EpisodeStore, StoreFacts, append, writing
from jepa.envs.policies import Policy
from jepa.envs.types import BatchedEnv, node_of
from jepa.seeding import derive_seed

GROUP_SIZE = 100
"""Episodes of a group, which are collected together."""
BAR_DELAY = 5
"""Seconds before a progress bar appears."""


def collect(
    folder: Path, *, env: BatchedEnv, policy: Policy, num_episodes: int, num_steps: int, seed: int
) -> EpisodeStore:
    """A store with at least `num_episodes` episodes of at most `num_steps` steps.

    Episode n depends on (seed, n) alone. Raises RunError if the folder holds episodes of another environment, policy or
    seed.
    """
    facts = StoreFacts(
        frame_shape=env.frame_shape, actions=env.actions, state_names=env.state_names,
        env=node_of(env), policy=node_of(policy), seed=seed,
    )  # fmt: skip
    with writing(folder, facts):
        done = len(EpisodeStore(folder))
        with tqdm(total=num_episodes, initial=done, desc="episodes", delay=BAR_DELAY, leave=False) as bar:
            while done < num_episodes:
                numbers = range(done, min(done + GROUP_SIZE - done % GROUP_SIZE, num_episodes))
                append(folder, rollouts(env, policy, [derive_seed(seed, n, 0, "episode") for n in numbers], num_steps))
                done = numbers.stop
                bar.update(len(numbers))
    return EpisodeStore(folder)


def rollouts(env: BatchedEnv, policy: Policy, seeds: Sequence[int], num_steps: int) -> list[Episode]:
    """One episode for each seed, all stepped together; each ends after `num_steps` steps or when its world ends."""
    frames, states = env.reset(seeds)
    policy.begin(env.actions, seeds, num_steps)
    history = [(frames, states)]
    transitions = []
    for step in range(num_steps):
        actions = policy.act(step, *history[-1])
        after = env.step(actions)
        transitions.append((actions, after.rewards, after.terminated, after.truncated))
        history.append((after.frames, after.states))
    frames, states = (np.stack(column, axis=1) for column in zip(*history, strict=True))  # [B, T + 1, ...]
    columns = [np.stack(column, axis=1) for column in zip(*transitions, strict=True)]  # [B, T, ...]
    ends = columns[2] | columns[3]
    lengths = np.where(ends.any(axis=1), ends.argmax(axis=1) + 1, num_steps)
    return [
        Episode(frames[n, : length + 1], states[n, : length + 1], *(column[n, :length] for column in columns))
        for n, length in enumerate(lengths)
    ]
