"""Names, paths and class names stay the text that was typed."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from jepa.cli.preflight import preflight
from jepa.comparison.plan import Recipe, plan
from jepa.config import Composer, ConfigError, compose, to_dataclass, to_yaml

WORDS = (
    *("007", "1e3", "1E-5", "0x10", "0b1", "1_000", "1.50", ".5", "5.", "+3", "-1", "inf", "nan", "-inf", "1e400"),
    *("on", "off", "yes", "no", "y", "n", "null", "Null", "none", "true", "True", "False", "2024-01-02"),
    "12345678901234567890",
)  # fmt: skip


@pytest.mark.parametrize("word", WORDS)
def test_a_name_stays_the_text_that_was_typed_in_every_command(word: str) -> None:
    assert compose([f"name={word}"]).name == word
    arguments, _, config = preflight([f"name={word}"])
    assert config["name"] == word
    assert Composer().parse([arguments[-1]])[0][0].value() == word  # for Hydra, which names the folder
    folder, _ = plan([f"name={word}", "objective=jepa,mae"], Recipe(), Composer(), None)
    assert folder == Path("outputs") / word


@pytest.mark.parametrize("word", WORDS)
def test_a_name_stays_text_in_the_configuration_of_the_run_folder(word: str) -> None:
    config = compose([f"name={word}"])
    text = to_yaml(config)
    assert yaml.safe_load(text) == asdict(config)
    assert OmegaConf.create(text).name == word
    assert to_dataclass(yaml.safe_load(text)) == config


@pytest.mark.parametrize("word", ["007", "1e3", "true", "2024"])
def test_paths_stay_the_text_that_was_typed(word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for part in ("one", "two"):
        (tmp_path / word / part).mkdir(parents=True)
        (tmp_path / word / part / "a.png").touch()
    config = Composer().check(["dataset=imagefolder", f"dataset.image_folder={word}"]).config
    assert config["dataset"]["image_folder"] == word
    assert Composer(None, "export").check([f"run={word}"]).config["run"] == word
    assert Composer(None, "eval").check([f"run={word}", f"task={word}"]).config["run"] == word
    assert Composer(None, "eval").check([f"run=[{word},{word}]"]).config["run"] == [word, word]


def test_null_numbers_and_words_of_other_keys_are_what_they_were() -> None:
    config = compose(["steps=null", "lr=1e-3", "epochs=12", "save_async=true", "evaluation.judge=null"])
    assert (config.steps, config.lr, config.epochs, config.save_async) == (None, 1e-3, 12, True)
    assert config.evaluation.judge is None


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (".", "neither '.' nor '..'"),
        ("./.", "neither '.' nor '..'"),
        ("a/../b", "neither '.' nor '..'"),
        ("/tmp/x", "below outputs/"),
        ("'a\nb'", "no line breaks"),
        ("'a\tb'", "no line breaks"),
        ("'a\x1b[31m'", "no line breaks"),
        ("' a'", "spaces at its ends"),
        ("''", "below outputs/"),
        ("a" * 300, "255 bytes, and this has 300"),
        ("b/" + "a" * 256, "255 bytes, and this has 256"),
        ("'" + "ä" * 130 + "'", "255 bytes, and this has 260"),
    ],
)
def test_a_name_that_is_no_folder_is_refused_in_one_line(name: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=r"name=") as raised:
        compose([f"name={name}"])
    (error,) = raised.value.errors
    assert reason in error
    assert error.isprintable()
    assert len(error) < 250


def test_names_with_folders_spaces_and_letters_of_all_scripts_are_taken() -> None:
    for name in ("a/b", "'two words'", "'Grüße'", "'日本'", "a" * 255):
        assert compose([f"name={name}"]).name == name.strip("'")


def test_a_sweep_whose_folder_names_are_too_long_is_refused_with_what_to_do() -> None:
    keys = [
        *("schedule.weight_decay=[0.04000000000001,0.04000000000002],[0.05,0.06]", "lr=0.00012345678901,1e-3"),
        *("optimizer.betas=[0.90000000000001,0.95000000000001],[0.9,0.99]", "augment.jitter=0.10000000000001,0.2"),
        "augment.crop_scale=[0.30000000000001,0.90000000000001],[0.5,1.0]",
        "augment.crop_aspect=[0.75000000000001,1.30000000000001],[0.8,1.2]",
    ]
    with pytest.raises(ConfigError, match=r"name of \d+ bytes.*sweep fewer keys"):
        preflight(["--multirun", *keys])


def test_only_words_that_hydra_would_change_are_quoted() -> None:
    arguments, _, _ = preflight(["name=run-1", "epochs=3"])
    assert arguments[-2:] == ["name=run-1", "epochs=3"]
