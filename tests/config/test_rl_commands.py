"""The rules between the keys of jepa-rl and jepa-play, each refused at its bound and not before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jepa.config import ConfigError, compose_play, compose_rl
from jepa.config.rl_rules import find_spec


def errors_of(compose: Any, *overrides: str) -> str:
    """Empty if nothing is refused."""
    try:
        compose(list(overrides))
    except ConfigError as error:
        return "\n".join(error.errors)
    return ""


@pytest.mark.parametrize("key", ["env_steps", "world_steps", "policy_steps"])
def test_every_round_has_a_step_of_each_kind(key: str) -> None:
    assert errors_of(compose_rl, "rounds=3", f"{key}=3") == ""
    assert f"{key}=2 with rounds=3: every round needs at least one" in errors_of(compose_rl, "rounds=3", f"{key}=2")


def test_the_first_steps_leave_one_for_each_later_round() -> None:
    assert errors_of(compose_rl, "rounds=3", "env_steps=100", "first_steps=98") == ""
    refused = errors_of(compose_rl, "rounds=3", "env_steps=100", "first_steps=99")
    assert "leaves no step for the rounds after the first" in refused
    assert "with one round" not in refused


def test_one_round_has_no_first_steps_of_its_own() -> None:
    assert errors_of(compose_rl, "env_steps=100", "first_steps=100") == ""
    refused = errors_of(compose_rl, "env_steps=100", "first_steps=99")
    assert refused.count("first_steps") == 1
    assert "with one round all steps are the first" in refused


@pytest.mark.parametrize("baseline", ["ppo", "ppo_features"])
def test_baselines_of_an_extra_are_refused_where_it_is_missing(baseline: str, monkeypatch) -> None:
    monkeypatch.setattr("jepa.config.rl_rules.find_spec", lambda _: None)
    assert "ppo needs stable-baselines3" in errors_of(compose_rl, f"baselines=[random,{baseline}]")
    assert errors_of(compose_rl, "baselines=[random]") == ""
    monkeypatch.setattr("jepa.config.rl_rules.find_spec", lambda _: find_spec("json"))
    assert errors_of(compose_rl, f"baselines=[{baseline}]") == ""
    assert "no such baseline" in errors_of(compose_rl, "baselines=[ppp]")


def run_with(folder: Path, state: object) -> str:
    checkpoint = folder / "checkpoints" / "step_00000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps(state))
    return f"run={folder}"


def test_jepa_play_needs_a_run_with_a_policy(tmp_path: Path) -> None:
    assert errors_of(compose_play, run_with(tmp_path / "a", {"step": 1, "policy": {}})) == ""
    assert errors_of(compose_play, run_with(tmp_path / "b", {})) == ""  # a damaged state is refused when it is read
    assert "holds no policy" in errors_of(compose_play, run_with(tmp_path / "c", {"step": 1}))
    assert "holds no policy" in errors_of(compose_play, f"run={tmp_path / 'none'}")


def test_actions_are_typed_or_given_and_keys_are_for_typing(tmp_path: Path) -> None:
    run = run_with(tmp_path, {"step": 1, "policy": {}})
    for allowed in (["typed=true"], ["actions=[1]"], ["typed=true", "keys={a:1}"]):
        assert errors_of(compose_play, run, *allowed) == ""
    assert "actions are typed or given; choose one" in errors_of(compose_play, run, "typed=true", "actions=[1]")
    assert "keys={a:1}: needs typed=true" in errors_of(compose_play, run, "keys={a:1}")
