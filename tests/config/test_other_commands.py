"""The configurations of jepa-eval, -export, -embed and -collect are refused and composed as that of jepa-train is."""

from __future__ import annotations

import pytest

from jepa.config import Composer, ConfigError, compose, compose_collect, compose_embed, compose_eval, compose_export
from jepa.config.catalogue import conf_folder


def faults_of(compose, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        compose(list(overrides))
    return caught.value.errors


def test_eval_takes_a_run_and_a_dataset_by_name() -> None:
    config = compose_eval(["run=timm:vit_tiny_patch16_224", "dataset=cifar10", "dataset.root_path=/data"])
    assert config.run == "timm:vit_tiny_patch16_224"
    assert config.dataset["root_path"] == "/data"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["run=x", "taks=knn"], 'did you mean "task"?'),
        (["run=x", "dataset=cifra10"], "did you mean"),
        (["run=x", "seed=half"], "takes a whole number"),
        (["run=x", "dataset=cifar10", "dataset.foo=1"], "dataset.foo=1"),
        ([], "run=VALUE"),
    ],
)
def test_eval_refuses_with_the_nearest_name(overrides: list[str], expected: str) -> None:
    assert any(expected in fault for fault in faults_of(compose_eval, *overrides))


def test_export_needs_a_run_and_knows_its_keys() -> None:
    assert compose_export(["run=timm:vit_tiny_patch16_224", "output=no-such-folder"]).format == "safetensors"
    assert any("run=VALUE" in fault for fault in faults_of(compose_export))
    assert any('did you mean "format"?' in fault for fault in faults_of(compose_export, "run=x", "fromat=timm"))


def test_a_group_of_another_command_is_refused_in_words() -> None:
    assert any("env: this command has no such group" in fault for fault in faults_of(compose, "env=two_rooms"))
    assert any("mask: this command has no such group" in fault for fault in faults_of(compose_collect, "mask=block"))


@pytest.mark.parametrize("dataset", sorted(path.stem for path in (conf_folder() / "dataset").glob("*.yaml")))
def test_features_of_every_data_set_are_configured_without_the_settings_of_its_training(dataset: str) -> None:
    overrides = ["run=timm:vit_tiny_patch16_224", "out=f.npz", f"dataset={dataset}"]
    config, faults = Composer(None, "embed").check(overrides)
    assert not [fault for fault in faults if not fault.startswith("dataset.")], "only files that are not here"
    assert config["num_frames"] is None, "that of the run"
    assert any("augment" in fault for fault in faults_of(compose_embed, *overrides, "augment.flip=true"))
