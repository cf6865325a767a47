"""Episodes of a policy in its environment, and their rows of results."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jepa.data.collect import rollouts
from jepa.data.episode_store import Episode
from jepa.envs.policies import BatchedPolicy
from jepa.envs.types import BatchedEnv
from jepa.planning.protocol import mean_return
from jepa.reports.statistics import wilson
from jepa.rl.replay import GROUP
from jepa.seeding import derive_seed


def play_episodes(
    env: BatchedEnv, policy: BatchedPolicy, *, num_episodes: int, episode_steps: int, seed: int
) -> tuple[list[Episode], float]:
    """Episodes that depend on the policy and (seed, number) alone, and the seconds that they took."""
    begun, episodes = time.perf_counter(), []
    for first in range(0, num_episodes, GROUP):
        numbers = range(first, min(first + GROUP, num_episodes))
        seeds = [derive_seed(seed, number, 0, "evaluation") for number in numbers]
        episodes += rollouts(env, policy, seeds, episode_steps)
    return episodes, time.perf_counter() - begun


def row(
    policy: str, episodes: Sequence[Episode], *, seed: int, env_steps: int, seconds: float, success_return: float | None
) -> dict[str, Any]:
    """A row of results.json; shares are 0 to 1, intervals at 95 %."""
    outcomes = [{"return": float(one.rewards.sum()), "steps": len(one.actions)} for one in episodes]
    if success_return is not None:
        outcomes = [outcome | {"success": outcome["return"] > success_return} for outcome in outcomes]
    return {
        "policy": policy, "seed": seed, "episodes": len(outcomes), "env_steps": env_steps, **scores(outcomes),
        "seconds": round(seconds, 2), "outcomes": outcomes,
    }  # fmt: skip


def scores(outcomes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean return and steps, and the share of successes if there are any to be told."""
    result = mean_return([outcome["return"] for outcome in outcomes])
    result["mean_steps"] = float(np.mean([outcome["steps"] for outcome in outcomes]))
    if "success" in outcomes[0]:
        won = sum(outcome["success"] for outcome in outcomes)
        result |= {"success": won / len(outcomes), "interval": list(wilson(won / len(outcomes), len(outcomes)))}
    return result


def check_rows(results: Mapping[str, Any]) -> None:
    """Raises LookupError, TypeError or ValueError for rows that cannot be averaged, or that have no step."""
    for found in results["rows"]:
        if found["seed"] is not None:
            mean_row([found])
    for entry in results["history"]:
        int(entry["step"])


def mean_row(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Over the seeds of one policy; the intervals are those of all episodes together."""
    outcomes = [outcome for one in rows for outcome in one["outcomes"]]
    return {
        "policy": rows[0]["policy"], "seed": None, "episodes": len(outcomes), "env_steps": rows[0]["env_steps"],
        **scores(outcomes), "seconds": sum(one["seconds"] for one in rows) / len(rows), "outcomes": [],
    }  # fmt: skip
