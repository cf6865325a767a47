"""Rules between the keys of `jepa-rl` and `jepa-play`. Without torch."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from jepa.config import checkpoints
from jepa.config.view import ConfigView, Rule
from jepa.suggestions import suggestion

MODEL_FREE = ("random", "ppo", "ppo_features")
"""Rows beside the policy of jepa-rl."""


def _rounds(view: ConfigView) -> Iterator[str]:
    """Every round has steps of each kind."""
    rounds = view["rounds"]
    for key in ("env_steps", "world_steps", "policy_steps"):
        if view[key] < rounds:
            yield f"{view.describe(key, 'rounds')}: every round needs at least one; lower rounds"
    first = view.get("first_steps")
    if first is not None and rounds == 1 and first != view["env_steps"]:
        yield f"{view.describe('first_steps')}: with one round all steps are the first; leave it out, or raise rounds"
    elif first is not None and first > view["env_steps"] - (rounds - 1):
        yield f"{view.describe('first_steps', 'env_steps')}: leaves no step for the rounds after the first"


def _baselines(view: ConfigView) -> Iterator[str]:
    if "ppo_steps" not in view:
        return
    for name in view["baselines"]:
        if name not in MODEL_FREE:
            valid = f"{suggestion(name, MODEL_FREE)}; valid: {', '.join(MODEL_FREE)}"
            yield f"{view.describe('baselines')}: no such baseline{valid}"
    if any(name.startswith("ppo") for name in view["baselines"]) and find_spec("stable_baselines3") is None:
        yield f"{view.describe('baselines')}: ppo needs stable-baselines3: pip install 'jepa-train[rl]'"


def _player(view: ConfigView) -> Iterator[str]:
    """The run has a policy, and actions come from one source."""
    if "typed" not in view:
        return
    run = str(view["run"])
    path = checkpoints.locate(Path(run).expanduser())
    state = checkpoints.quiet_state(path) if path else {}
    if path is None or (state and "policy" not in state):  # a damaged state is refused by its name when it is read
        yield f"{view.describe('run')}: {run} holds no policy; give the folder of a run of jepa-rl, as outputs/NAME"
    if view["typed"] and view.get("actions") is not None:
        yield f"{view.describe('typed', 'actions')}: actions are typed or given; choose one"
    if view.config.get("keys") and not view["typed"]:
        yield f"{view.describe('keys')}: needs typed=true"


RL_RULES: tuple[Rule, ...] = (_rounds, _baselines, _player)
