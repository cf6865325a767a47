"""What is typed wins over what an experiment says, or is refused: for all presets, groups and keys."""

from __future__ import annotations

from typing import Any

import pytest

from jepa.cli.preflight import preflight
from jepa.config import Composer, override_literal
from jepa.config.catalogue import GLOBAL_GROUPS, Catalogue, Choice, conf_folder, find, flatten

CATALOGUE = Catalogue([conf_folder()])
COMPOSER = Composer()
EXPERIMENTS = sorted(CATALOGUE.groups["experiment"])
GROUPS = [
    *("encoder", "size", "mask", "predictor", "optimizer", "schedule"),
    *("objective", "dataset", "regularizer", "evaluator", "logger"),
]
SEVERAL = {"regularizer", "evaluator", "logger"}
OWN_RULES = {"experiment", "resume", "estimate"}


def config_of(*overrides: str) -> dict[str, Any]:
    return COMPOSER.check(overrides).config


def other_value(value: Any) -> Any:
    """A value of the same kind that differs; None for kinds that are not tried."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    return value / 2 if isinstance(value, float) and value else None


def test_every_group_of_the_command_is_walked_through() -> None:
    groups = {group for group in COMPOSER.default([]) if group in CATALOGUE.groups} | {"size"}
    assert groups == set(GROUPS) - GLOBAL_GROUPS


def is_chosen(choice: Choice, config: dict[str, Any]) -> bool:
    """True if the configuration has the component of the choice, or all values of a choice that has none."""
    if choice.group in SEVERAL:
        return set(config[choice.group]) == {key.split(".")[1] for key in choice.values if "." in key}
    if target := choice.values.get(f"{choice.group}._target_"):
        return config[choice.group].get("_target_") == target
    return {key: find(config, key) for key in choice.values} == choice.values


@pytest.mark.parametrize("groups", [GROUPS[:6], *([group] for group in GROUPS[6:])], ids=",".join)
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_typed_choice_of_any_group_is_the_one_that_is_trained(experiment: str, groups: list[str]) -> None:
    """Every preset meets one choice of each group; over all presets, nearly every choice has its turn."""
    turn = EXPERIMENTS.index(experiment)
    choices = [choices[turn % len(choices)] for choices in (list(CATALOGUE.groups[group].values()) for group in groups)]
    config, errors = COMPOSER.check([f"experiment={experiment}", *(f"{c.group}={c.name}" for c in choices)])
    assert [c for c in choices if not is_chosen(c, config) and not any(c.group in e for e in errors)] == []


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_typed_value_of_any_key_is_the_one_that_is_trained(experiment: str) -> None:
    own = f"experiment={experiment}"
    values = ((key, other_value(value)) for key, value in flatten(config_of(own)) if key not in OWN_RULES)
    typed = {key: value for key, value in values if value is not None}
    config = config_of(own, *(f"{key}={override_literal(value)}" for key, value in typed.items()))
    assert {key: find(config, key) for key in typed} == typed
    epochs = config_of(own, "epochs=7")
    assert (epochs["epochs"], epochs["steps"]) == (7, None), "steps of the experiment give way"
    both = config_of(own, "epochs=7", "steps=9")
    assert (both["epochs"], both["steps"]) == (7, 9)


def test_typed_keys_win_over_a_typed_size_and_a_size_over_the_experiment() -> None:
    encoder = config_of("experiment=quickstart", "encoder.depth=4", "size=large")["encoder"]
    assert (encoder["embed_dim"], encoder["depth"], encoder["num_heads"]) == (1024, 4, 16)
    tiny = config_of("experiment=quickstart", "size=tiny")["encoder"]
    assert (tiny["embed_dim"], tiny["depth"]) == (192, 12), "also a size that the experiment names and then changes"


def test_settings_of_an_experiment_stay_with_its_components() -> None:
    config = config_of("experiment=quickstart", "objective=jepa", "mask=block", "predictor=cross_attention")
    assert config["objective"]["momentum"] == 0.97
    assert config["mask"]["ratio"] == 0.6
    assert config["predictor"]["width"] == 48


def test_a_typed_data_set_brings_what_must_not_be_done_to_it() -> None:
    flips = [config_of("experiment=cifar10_vit_tiny", *data)["augment"]["flip"] for data in ([], ["dataset=mnist"])]
    assert flips == [True, False]
    own = config_of("experiment=mnist_vit_tiny")["augment"]
    assert config_of("experiment=mnist_vit_tiny", "dataset=mnist")["augment"] == own


def test_a_size_that_phases_set_is_refused() -> None:
    phases = "phases=[{share: 0.5, num_frames: 2}, {share: 0.5, num_frames: 4}]"
    errors = COMPOSER.check(["experiment=vjepa2_vitl16", "num_frames=8"]).errors
    assert any("num_frames=8: the phases of the run set it (num_frames: 16, 64)" in error for error in errors)
    assert not any("the phases of the run" in e for e in COMPOSER.check(["experiment=vjepa2_vitl16", phases]).errors)


def test_a_message_about_a_size_names_what_was_typed() -> None:
    errors = COMPOSER.check(["experiment=quickstart", "size=large", "encoder.num_heads=10"]).errors
    assert any("encoder.num_heads=10" in error and "size=large" in error for error in errors), errors


def test_cfg_shows_what_would_be_trained(capsys: pytest.CaptureFixture[str]) -> None:
    assert preflight(["experiment=quickstart", "size=large", "--cfg", "job", "--package", "encoder"]) is None
    assert "embed_dim: 1024\n" in capsys.readouterr().out
