"""Environments: several copies that are stepped together, and what they know of their world."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from jepa.errors import FileError
from jepa.types import ActionSpace, Traits


class Transition(NamedTuple):
    """Result of a step of all environments; `frames` and `states` are those after the step."""

    frames: np.ndarray
    """uint8 [B, C, H, W]"""
    states: np.ndarray
    """float32 [B, S]: numbers that the simulator knows"""
    rewards: np.ndarray
    """float32 [B]"""
    terminated: np.ndarray
    truncated: np.ndarray
    """bool [B]"""


class Task(NamedTuple):
    """A start and a goal, as states [S]."""

    start: np.ndarray
    goal: np.ndarray


class BatchedEnv(Protocol):
    """Environments that are stepped together, as many as `reset` gets seeds.

    One that has ended keeps its state until all are reset.

    This is gymnasium's AutoresetMode.DISABLED: no frame of a new episode ever follows an action of the old one.
    """

    settings: Mapping[str, Any]
    """Arguments of the constructor."""
    actions: ActionSpace
    frame_shape: tuple[int, int, int]
    """(C, H, W)"""
    state_names: tuple[str, ...]

    def reset(
        self, seeds: Sequence[int], states: np.ndarray | None = None, goals: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Start episodes from seeds, or from states [B, S] -> frames uint8 [B, C, H, W] and states float32 [B, S]."""
        ...

    def step(self, actions: np.ndarray) -> Transition:
        """Actions float [B, A], or whole numbers [B]. Raises ValueError for actions out of bounds or not finite."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class EnvTraits(Traits):
    """Optional attributes of an environment."""

    task: Callable[[int], Task] | None = None
    """seed -> start and goal"""
    thresholds: Mapping[str, float] | None = None
    """Name of a criterion of success -> largest distance from the goal."""
    distance: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None
    """states [n, S], goals [n, S] -> [n]"""
    render: Callable[[np.ndarray], np.ndarray] | None = None
    """states [n, S] -> frames uint8 [n, C, H, W]"""
    simulate: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None
    """True dynamics: states [n, S], actions [n, A] -> states [n, S]"""
    path_length: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None
    """Length of the shortest path: states [n, S], goals [n, S] -> [n]"""
    expert: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None
    """states [n, S], goals [n, S] -> actions [n, A]"""
    straight_line: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None
    """As the expert, but through walls: states [n, S], goals [n, S] -> actions [n, A]"""
    extent: tuple[tuple[float, float], tuple[float, float]] | None = None
    """Where the first two columns of a state are positions of a plane: (left, right), (top, bottom) of the picture."""
    goal_size: int | None = None
    """Number of the first columns of a state that a goal fixes; None for all."""
    group_size: int = 100
    """Number of episodes that are collected together; a process that is killed loses as many."""


def node_of(component: Any) -> dict[str, Any]:
    """The node that builds an environment or a policy anew."""
    kind = type(component)
    return {"_target_": f"{kind.__module__}.{kind.__qualname__}", **component.settings}


def stored_node(node: Mapping[str, Any], file: Path) -> Mapping[str, Any]:
    """The node of an environment in a file. Raises FileError if building it would run code that the file chose.

    That is any class outside of `jepa.envs`, a nested node or an interpolation, and an id with a module, which
    gymnasium would import.
    """
    target = str(node.get("_target_"))
    if not re.fullmatch(r"jepa\.envs\.\w+\.[A-Z]\w*", target):
        raise FileError(f"{file}: env {target!r} is no environment of this package; give env= on the command line")
    if ":" in str(node.get("id", "")):
        raise FileError(f"{file}: env.id {node['id']!r} imports a module; give env= and env.id= on the command line")
    arguments = json.dumps({key: value for key, value in node.items() if key != "_target_"})
    if found := next((text for text in ("_target_", "${") if text in arguments), None):
        raise FileError(f"{file}: env {target!r} has {found} in its arguments; give env= on the command line")
    return node


def check_actions(space: ActionSpace, actions: np.ndarray, count: int) -> np.ndarray:
    """The actions as float32 [n, A] or int64 [n]. Raises ValueError if they are not `count` actions of this space."""
    actions = np.asarray(actions)
    if actions.shape != (count, *space.shape):
        raise ValueError(f"actions of shape {actions.shape}: expected {(count, *space.shape)}")
    rows = actions.reshape(count, -1)
    if space.is_discrete:
        is_valid = (rows >= 0) & (rows < space.num_actions) & (rows == np.round(rows))
        limits = f"whole numbers from 0 to {space.num_actions - 1}"
    else:
        slack = 1e-4 * (np.asarray(space.high) - np.asarray(space.low))
        is_valid = (rows >= space.low - slack) & (rows <= space.high + slack)  # False also for NaN
        limits = f"{list(space.low)} to {list(space.high)}"
    if not is_valid.all():
        row = int(np.argmin(is_valid.all(axis=1)))
        raise ValueError(f"action {row} is {np.round(actions[row], 4).tolist()}; valid: {limits}")
    return actions.astype(np.int64 if space.is_discrete else np.float32)


def check_states(states: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A copy as float32 [B, S]. Raises ValueError for another shape and for values that are not finite."""
    states = np.array(states, dtype=np.float32)
    if states.shape != shape:
        raise ValueError(f"states or goals of shape {states.shape}: expected {shape}")
    if not np.isfinite(states).all():
        row = int(np.argmin(np.isfinite(states).all(axis=1)))
        raise ValueError(f"state or goal {row} is {states[row].tolist()}: takes finite numbers")
    return states
