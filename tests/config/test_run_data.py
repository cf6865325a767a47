"""Commands that are given a run begin from its data, and explicit data win."""

from __future__ import annotations

from pathlib import Path

import pytest

from jepa.config import ConfigError, compose, compose_eval, to_yaml
from jepa.config.finetuning import to_train_arguments
from jepa.config.run_data import describe_data, run_data

SMALL = ["image_size=32", "encoder.patch_size=8", "mask=random"]


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes the parts of outputs/NAME that say what it was trained on."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cats" / "train" / "tabby").mkdir(parents=True)
    (tmp_path / "cats" / "train" / "tabby" / "1.jpg").touch()

    def store(name: str, *overrides: str) -> str:
        step = tmp_path / "outputs" / name / "checkpoints" / "step_00000001"
        step.mkdir(parents=True)
        (step / "config.yaml").write_text(to_yaml(compose([*SMALL, *overrides])))
        (step / "state.json").write_text('{"step": 1, "clip_shape": [3, 1, 32, 32]}')
        return f"outputs/{name}"

    return store


CATS = ["dataset=imagefolder", "dataset.root_path=cats", "dataset.val_folder=train"]


def test_an_evaluation_uses_the_data_of_the_run_and_is_named_after_it(stored) -> None:
    run = stored("mine", *CATS)
    config = compose_eval([f"run={run}"])
    assert config.dataset["_target_"].endswith("ImageFolder")
    assert (config.dataset["root_path"], config.dataset["val_folder"]) == ("cats", "train")
    assert config.name == "eval-mine"
    assert compose_eval([f"run={run}", "name=other", "task=inspect"]).name == "other"


def test_explicit_data_win(stored) -> None:
    run = stored("mine", *CATS)
    config = compose_eval([f"run={run}", "dataset=shapes", "dataset.side=32"])
    assert (config.dataset["_target_"], config.name) == ("jepa.data.embedded.Shapes", "eval-shapes")
    assert compose_eval(["run=timm:vit_tiny_patch16_224"]).dataset["_target_"] == "jepa.data.embedded.Shapes"


def test_a_choice_that_shares_its_class_with_others_is_found_by_its_values(stored) -> None:
    assert run_data([stored("digits", "dataset=mnist", "dataset.root_path=cats")])[0] == "dataset=mnist"


def test_clips_keep_their_number_of_frames(stored) -> None:
    run = stored("moving", "dataset=moving_digits", "encoder=temporal", "num_frames=4")
    assert compose_eval([f"run={run}"]).num_frames == 4


def test_runs_on_different_data_must_be_told_what_to_be_judged_on(stored) -> None:
    first, second = stored("first", *CATS), stored("second", "dataset.side=32")
    with pytest.raises(ConfigError, match="were trained on different data; give dataset="):
        compose_eval([f"run=[{first},{second}]"])
    assert compose_eval([f"run=[{first},{second}]", "dataset=shapes"]).run == [first, second]


def test_an_evaluation_reads_tokens_as_the_run_does_unless_told_otherwise(stored) -> None:
    run = stored("mine", *CATS, "evaluator=[knn,linear]", "evaluator.linear.readout=tokens")
    other = stored("other", *CATS, "evaluator=[knn,linear]", "evaluator.knn.readout=grid2")

    def readouts(*overrides: str) -> dict[str, str]:
        evaluators = compose_eval(overrides).evaluator
        return {name: evaluators[name]["readout"] for name in ("knn", "linear")}

    assert readouts(f"run={run}") == {"knn": "mean", "linear": "tokens"}
    assert readouts(f"run={run}", "dataset=shapes") == {"knn": "mean", "linear": "tokens"}
    assert readouts(f"run={run}", "evaluator.linear.readout=mean") == {"knn": "mean", "linear": "mean"}
    assert readouts(f"run=[{run},{other}]") == {"knn": "mean", "linear": "mean"}
    assert compose_eval([f"run={run}", "readout=cls"]).readout == "cls"
    every = stored("every", *CATS, "evaluator.regression.readout=steps")  # a probe that jepa-eval does not have
    assert readouts(f"run={every}") == {"knn": "mean", "linear": "mean"}


def test_fine_tuning_uses_the_data_of_the_run(stored) -> None:
    run = stored("mine", *CATS)
    arguments = to_train_arguments([f"run={run}"])
    assert "dataset=imagefolder" in arguments
    assert "dataset.root_path=cats" in arguments
    assert not [a for a in to_train_arguments([f"run={run}", "dataset=shapes"]) if a.startswith("dataset.")]
    assert "dataset=imagefolder" not in to_train_arguments([f"run={run}", "experiment=bccd_detection"])


def test_what_a_run_does_not_mirror_is_not_mirrored_when_its_labels_are_learnt(stored) -> None:
    run, other = stored("turns", *CATS, "augment.flip=false"), stored("mirrored", *CATS)
    assert "augment.flip=false" in to_train_arguments([f"run={run}"])
    typed = to_train_arguments([f"run={run}", "augment.flip=true"])
    assert typed.index("augment.flip=true") > typed.index("augment.flip=false")
    assert compose_eval([f"run={run}", "task=finetune"]).augment.flip is False
    assert compose_eval([f"run={run}", "task=finetune", "augment.flip=true"]).augment.flip is True
    assert compose_eval([f"run={other}", "task=finetune"]).augment.flip is True
    assert compose_eval([f"run=[{other},{run}]", "task=finetune"]).augment.flip is False


def test_data_of_another_package_are_asked_for(stored, tmp_path: Path) -> None:
    run = stored("other")
    path = tmp_path / run / "checkpoints" / "step_00000001" / "config.yaml"
    path.write_text(path.read_text().replace("jepa.data.embedded.Shapes", "mine.Walks"))
    with pytest.raises(ConfigError, match=r"was trained on mine\.Walks, which is no choice here; give dataset="):
        compose_eval([f"run={run}"])


def test_data_are_named_by_what_is_read() -> None:
    folder = {"_target_": "jepa.data.folders.ImageFolder", "root_path": "./data", "image_folder": "train"}
    assert describe_data(folder) == "ImageFolder of data/train"
    assert describe_data({"_target_": "jepa.data.embedded.Shapes"}) == "Shapes"


def test_data_on_a_server_are_found_by_the_same_urls_whatever_the_folder_of_copies(stored) -> None:
    pytest.importorskip("aiohttp")
    url = "https://user:secret@host/train-{000..009}.tar"
    shards = ["dataset=webdataset", f'dataset.shards="{url}"', "dataset.val_shards=https://host/val.tar"]
    first, second = (
        stored("first", *shards),
        stored("second", *shards, "dataset.cache=/scratch", "dataset.cache_size=9"),
    )
    node = compose_eval([f"run={second}"]).dataset
    assert (node["shards"], node["val_shards"]) == (url, "https://host/val.tar")
    assert (node["cache"], node["cache_size"]) == ("/scratch", 9)
    assert run_data([first, second]) == run_data([first])
    assert describe_data(node) == "Shards of https://host/train-{000..009}.tar"
