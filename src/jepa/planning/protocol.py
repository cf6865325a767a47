"""The protocol of planning: frozen tasks, episodes of a controller, rows of results with intervals.

Start and goal of every task are saved in tasks.json; its hash stands in the results, so that only results on the same
tasks are compared. A task that is solved at its start is left out. In an environment without goals a task is an episode
for rewards: its start is the number that the environment is reset with, its goal is zero.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jepa.config.files import Fields, as_mapping, read_json
from jepa.envs.types import BatchedEnv, EnvTraits, Task, node_of
from jepa.errors import ConfigError, FileError
from jepa.planning.control import Controller, Goals
from jepa.reports.statistics import mean_interval, wilson
from jepa.runs.metrics import write_atomically
from jepa.seeding import derive_seed

SCHEMA = 1
NUM_TIMED = 3
"""Episodes that are run alone to measure the seconds of an episode."""


class Outcome(NamedTuple):
    """Of one episode."""

    start: list[float]
    goal: list[float]
    steps: int
    """Steps until the strict criterion was met, else all."""
    distance: float
    """The least distance from the goal."""
    moderate: bool
    strict: bool


class Gain(NamedTuple):
    """Of one episode without a goal."""

    start: list[float]
    reward: float
    """Sum over the episode."""
    steps: int


@dataclass(frozen=True)
class Played:
    """The episodes of a controller."""

    outcomes: list[Outcome] | list[Gain]
    num_steps: int
    """Steps of the longest episode."""
    seconds: float
    frames: list[np.ndarray] = field(default_factory=list)
    """uint8 [T + 1, C, H, W] of each of the first episodes, up to its end"""
    states: list[np.ndarray] = field(default_factory=list)
    """float32 [T + 1, S] of the same"""


def make_tasks(env: BatchedEnv, num_tasks: int, seed: int) -> list[Task]:
    """Tasks that are not solved at their start. Raises ConfigError if the environment has goals but no way to tell."""
    traits = EnvTraits.of(env)
    if traits.task is None:
        numbers = [derive_seed(seed, number, 0, "task") >> 40 for number in range(num_tasks)]  # exact as float32
        return [Task(np.array([number], dtype=np.float32), np.zeros(1, dtype=np.float32)) for number in numbers]
    if traits.distance is None or traits.render is None or not traits.thresholds:
        raise ConfigError(
            [f"env: {type(env).__name__} has no tasks with starts and goals to plan for; try env=two_rooms"]
        )
    tasks: list[Task] = []
    number, least = 0, max(traits.thresholds.values())
    while len(tasks) < num_tasks:
        task = traits.task(derive_seed(seed, number, 0, "task") >> 32)
        if traits.distance(task.start[None], task.goal[None])[0] >= least:
            tasks.append(task)
        number += 1
        if number > 100 * num_tasks:
            raise ConfigError([f"env: nearly all tasks of {type(env).__name__} are solved at their start"])
    return tasks


def frozen_tasks(folder: Path, env: BatchedEnv, num_tasks: int, seed: int) -> tuple[list[Task], str]:
    """The tasks in tasks.json, written if it is not there, and their hash.

    Raises ConfigError if they are of another environment, seed or number.
    """
    path = folder / "tasks.json"
    wanted = {"schema": SCHEMA, "env": node_of(env), "seed": seed, "episodes": num_tasks}
    if not path.exists():
        tasks = [
            {"start": task.start.tolist(), "goal": task.goal.tolist()} for task in make_tasks(env, num_tasks, seed)
        ]
        write_json(path, {**wanted, "tasks": tasks})
    found = read_json(path, {"schema": int, "env": dict, "seed": int, "episodes": int, "tasks": list})
    if changed := [key for key, value in json.loads(json.dumps(wanted)).items() if found[key] != value]:
        key = changed[0]
        raise ConfigError([f"{path} has tasks of {key}={found[key]}, now {wanted[key]}; give another name="])
    numbers = {"start": list[float], "goal": list[float]}
    rows = [as_mapping(task, f"{path}: task {number}", numbers) for number, task in enumerate(found["tasks"])]
    tasks = [Task(*(np.array(row[key], dtype=np.float32) for key in ("start", "goal"))) for row in rows]
    if len(tasks) != num_tasks or len({len(state) for task in tasks for state in task}) != 1:
        raise FileError(f"{path}: holds {len(tasks)} tasks of differing sizes, expected {num_tasks}; remove it")
    text = json.dumps([[row["start"], row["goal"]] for row in rows])
    return tasks, f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def read_results(path: Path, fields: Fields, *uses: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    """results.json, whose entries have the form in which they were written: each of `uses` can be called with it.

    Raises FileError with what to do.
    """
    remedy = "remove it, and what it held is computed again"
    try:
        results = read_json(path, {"schema": int, **fields})
        for use in uses:
            use(results)
    except FileError as error:
        raise FileError(f"{error}; {remedy}") from error
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
        raise FileError(f"{path} holds an entry of another form than was written ({reason}); {remedy}") from error
    return results


def play(env: BatchedEnv, controller: Controller, tasks: Sequence[Task], *, budget: int, num_shown: int = 0) -> Played:
    """Run a controller on all tasks together, each until the strict criterion is met, or until the budget is used.

    An episode for rewards ends with its world.
    """
    traits, count = EnvTraits.of(env), len(tasks)
    starts, goals = (np.stack(states) for states in zip(*tasks, strict=True))
    criteria = sorted((traits.thresholds or {}).values(), reverse=True) if traits.task else []
    begun = time.perf_counter()
    if traits.task:
        assert traits.distance
        assert traits.render
        frames, states = env.reset(range(count), starts, goals)
        controller.begin(Goals(traits.render(goals), goals), range(count), budget)
        least = traits.distance(states, goals)
    else:
        frames, states = env.reset([int(start[0]) for start in starts])
        controller.begin(Goals(frames, states), range(count), budget)  # nothing reads these goals
        least = np.zeros(count)
    active, gained, steps = np.ones(count, dtype=bool), np.zeros(count), np.zeros(count, dtype=int)
    shown = [(frames[:num_shown].copy(), states[:num_shown].copy())]
    for step in range(budget):
        after = env.step(usable(env, controller.act(step, frames, states, active)))
        frames, states = after.frames, after.states
        gained, steps = gained + active * after.rewards, steps + active
        shown.append((frames[:num_shown].copy(), states[:num_shown].copy()))
        if criteria:
            assert traits.distance
            least = np.where(active, np.minimum(least, traits.distance(states, goals)), least)
            active &= least >= criteria[-1]
        active &= ~after.terminated & ~after.truncated
        if not active.any():
            break
    seconds = time.perf_counter() - begun
    if not criteria:
        rows = zip(starts, gained, steps, strict=True)
        gains = [Gain(start.tolist(), float(reward), int(number)) for start, reward, number in rows]
        return Played(gains, int(steps.max()), seconds, *series(shown, steps))
    steps = np.where(least < criteria[-1], steps, budget)
    outcomes = [
        Outcome(start.tolist(), goal.tolist(), int(number), float(near), *(bool(near < c) for c in ends))
        for start, goal, number, near in zip(starts, goals, steps, least, strict=True)
        for ends in [(criteria[0], criteria[-1])]
    ]
    return Played(outcomes, int(steps.max()), seconds, *series(shown, steps))


def series(shown: Sequence[tuple[np.ndarray, np.ndarray]], steps: np.ndarray) -> Iterator[list[np.ndarray]]:
    """Frames, then states, of each step of the first episodes -> those of each episode, up to its end."""
    for part in (0, 1):
        yield [np.stack([row[part][n] for row in shown[: steps[n] + 1]]) for n in range(len(shown[0][0]))]


def usable(env: BatchedEnv, actions: np.ndarray) -> np.ndarray:
    """Actions as the environment takes them; those out of bounds by rounding are clipped."""
    if env.actions.is_discrete:
        return actions.astype(np.int64)
    return np.clip(actions, env.actions.low, env.actions.high).astype(np.float32)


def row(
    policy: str, cost: str, seed: int, played: Played, *, seconds_per_episode: float, predictor_rows: float
) -> dict[str, Any]:
    """A row of results.json."""
    count = len(played.outcomes)
    return {
        "policy": policy, "cost": cost, "seed": seed, "episodes": count,
        **scores([outcome._asdict() for outcome in played.outcomes]),
        "seconds_per_episode": round(seconds_per_episode, 4),
        "ms_per_step": round(1000 * played.seconds / max(1, sum(outcome.steps for outcome in played.outcomes)), 3),
        "predictor_rows": round(predictor_rows), "outcomes": [outcome._asdict() for outcome in played.outcomes],
    }  # fmt: skip


def mean_row(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean over world seeds of rows of one policy and cost; the intervals are those of all episodes together."""
    averages = ("seconds_per_episode", "ms_per_step", "predictor_rows")
    return {
        "policy": rows[0]["policy"], "cost": rows[0]["cost"], "seed": None,
        "episodes": sum(row["episodes"] for row in rows),
        **scores([outcome for row in rows for outcome in row["outcomes"]]),
        **{name: sum(row[name] for row in rows) / len(rows) for name in averages}, "outcomes": [],
    }  # fmt: skip


def scores(outcomes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Shares of success, or the mean return of episodes without goals, with 95 % intervals."""
    count = len(outcomes)
    if "reward" in outcomes[0]:
        return mean_return([outcome["reward"] for outcome in outcomes])
    wins = {name: sum(outcome[name] for outcome in outcomes) for name in ("moderate", "strict")}
    shares = {f"success_{name}": won / count for name, won in wins.items()}
    return shares | {f"interval_{name}": list(wilson(won / count, count)) for name, won in wins.items()}


def mean_return(returns: Sequence[float]) -> dict[str, Any]:
    """The mean of the returns of episodes, with its 95 % interval."""
    return {"mean_return": float(np.mean(returns)), "interval_return": list(mean_interval(returns))}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(content, indent=1))
