"""Every command that a run prints, or that its page shows, runs as it stands there."""

from __future__ import annotations

import html
import re
import shlex
from pathlib import Path

import pytest
from fault_commands import TRAINING
from used_run import QUIET, run, write_two_classes

from jepa.cli.preflight import preflight
from jepa.runs.metrics import _command

pytestmark = pytest.mark.slow


def commands_in(text: str) -> list[list[str]]:
    """The lines after "next:" that are commands, without their comments."""
    return [shlex.split(line, comments=True) for line in text.partition("next:")[2].splitlines() if "jepa-" in line]


def again(folder: Path) -> list[str]:
    """The command below "Run it again" on the page of a run."""
    page = (folder / "report.html").read_text(encoding="utf-8")
    match = re.search(r"<h2>Run it again</h2><div class=\"card\"><pre>(.*?)</pre>", page, re.DOTALL)
    assert match
    return shlex.split(html.unescape(match[1]))


def runs(words: list[str]) -> bool:
    return run(words[0].removeprefix("jepa-"), *words[1:]) == 0


def test_next_commands_of_a_pretrained_and_of_a_tuned_run_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_two_classes(tmp_path / "pictures")
    data = ["dataset=imagefolder", "dataset.root_path=pictures"]
    assert run("train", *TRAINING, *data, "name=first") == 0
    look, tune, use = commands_in(capfd.readouterr().out)
    assert again(tmp_path / "outputs" / "first") == ["jepa-train", *TRAINING, *data, "name=first"]
    assert runs(look)
    assert (tmp_path / "outputs" / "eval-first").is_dir()
    assert runs(use)
    length = ["steps=2", "logger=none", *QUIET]
    assert run("finetune", *tune[1:], *length) == 0, "with fewer steps than it would take"
    answers, features, export = commands_in(capfd.readouterr().out)
    assert all(runs(words) for words in (answers, features, export))
    assert Path("outputs/first-tuned/predictions.csv").is_file()
    assert runs(again(tmp_path / "outputs" / "first-tuned")), "it is finished, and says so"
    assert "is finished" in capfd.readouterr().out


def test_on_generated_data_the_next_command_for_own_pictures_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_two_classes(tmp_path / "data")
    assert run("train", *TRAINING, "dataset.num_samples=32", "name=drawn") == 0
    look, own, use = commands_in(capfd.readouterr().out)
    assert own[0] == "jepa-train"
    assert preflight(own[1:]) is not None
    assert runs(look)
    assert runs(use)


def test_a_run_that_another_program_started_is_run_again_by_its_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("train", *TRAINING, "name=drawn") == 0
    monkeypatch.setattr("sys.argv", ["notebook.py"])
    assert runs(_command(Path("outputs/drawn"), {}))
    assert "outputs/drawn is finished" in capfd.readouterr().out
