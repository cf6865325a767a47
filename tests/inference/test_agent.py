"""JEPAAgent on an existing run: history, evaluation, fine-tuning, export, features; version and types."""

from __future__ import annotations

import contextlib
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from used_run import QUIET

import jepa
from jepa import JEPAAgent, JEPAConfig
from jepa.config import ConfigError


@pytest.fixture
def here(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(trained)
    return trained


def test_a_run_is_attached_to_with_its_configuration_and_history(here: Path) -> None:
    agent = JEPAAgent("outputs/first")
    assert agent.config.steps == 2
    assert agent.config.dataset["root_path"] == "pictures"
    assert [row["step"] for row in agent.history if "train/loss" in row] == [2]
    assert agent.train()["step"] == 2, "it is finished"


def test_history_and_features_need_no_data_set(here: Path) -> None:
    with contextlib.ExitStack() as stack:
        Path("pictures").rename("moved")
        stack.callback(Path("moved").rename, "pictures")
        agent = JEPAAgent("outputs/first")
        assert agent.history
        assert agent.encode([Path("moved/val/ant/00.png")]).shape == (1, 32)
        with pytest.raises(ConfigError, match="pictures"):
            _ = agent.config


def test_images_of_all_kinds_are_encoded_alike_without_gradients(here: Path) -> None:
    agent, path = JEPAAgent("outputs/first"), Path("pictures/val/bee/01.png")
    with Image.open(path) as image:
        array = np.array(image)
        for one in (path, str(path), image, array, torch.from_numpy(array).permute(2, 0, 1)):
            features = agent.encode([one])
            assert not features.requires_grad
            torch.testing.assert_close(features, agent.encode([path]))


def test_what_is_no_run_is_refused_with_what_is_there(here: Path) -> None:
    with pytest.raises(ConfigError, match=r"outputs/frist holds no run; .*outputs holds .*first/"):
        JEPAAgent("outputs/frist")
    with pytest.raises(ConfigError, match="is a run folder itself; leave folder=x out"):
        JEPAAgent("outputs/first", folder="x")
    with pytest.raises(ConfigError, match="taks"):
        JEPAAgent("outputs/first").evaluate("taks=knn")


@pytest.mark.slow
def test_it_is_evaluated_on_its_own_data_and_fine_tuned_and_predicts(here: Path) -> None:
    agent = JEPAAgent("outputs/first")
    (row,) = agent.evaluate("task=knn", "floors=[]", *QUIET)
    assert (row["title"], row["column"]) == ("first", "kNN")
    assert row["num_test"] == 12, "the held-out part of the pictures, not generated shapes"
    assert 0 <= row["low"] <= row["top1"] <= row["high"] <= 100
    length = ["steps=2", "batch_size=8", "logger=none", "evaluator=accuracy", *QUIET]
    tuned = agent.finetune(*length)
    assert tuned.folder == Path("outputs/first-tuned")
    assert tuned.config.dataset["root_path"] == "pictures"
    prediction = JEPAAgent(tuned.folder).predict(["pictures/val/ant/00.png"], top=2)
    assert sorted(one.name for one in prediction[0]) == ["ant", "bee"]


def test_it_is_exported_and_its_features_are_written(here: Path) -> None:
    agent = JEPAAgent("outputs/first")
    folder = agent.export()
    assert folder == Path("outputs/first/export/safetensors")
    path = Path("pictures/val/ant/00.png")
    exported = jepa.load_encoder(folder)
    content = agent.embed("images=pictures/val", *QUIET)
    assert (agent.folder / "features.npz").is_file()
    row = torch.from_numpy(content.features[content.names.index("ant/00.png")])
    with torch.no_grad():
        torch.testing.assert_close(exported(exported.transform([path])).mean(dim=1)[0], row, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(agent.encode(path)[0], row, rtol=1e-4, atol=1e-5)


def test_a_configuration_still_makes_a_new_run(here: Path) -> None:
    agent = JEPAAgent(JEPAConfig("name=new"))
    assert agent.folder == Path("outputs/new")
    assert agent.config.name == "new"


def test_the_package_knows_its_version_and_is_typed() -> None:
    assert jepa.__version__ == version("jepa-train")
    assert Path(jepa.__file__).with_name("py.typed").is_file()
    assert "load_finetuned" in jepa.__all__
