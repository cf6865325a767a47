"""Ctrl-C in every command: answered at once, ended with what is saved; a second one leaves without a traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import forked
import pytest
from tiny_agent import TINY

import jepa.agent
from jepa.errors import Interrupted
from jepa.parallel.signals import listen

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
NAMES = sorted(name.removeprefix("jepa-") for name in SCRIPTS)
IMPORTING = {
    "train": TINY,
    "find": ["lr", *TINY],
    "embed": ["run=timm:vit_tiny_patch16_224", "dataset=shapes", "out=features.npz"],
    "rl": ["rl=minigrid_jepa"],
    "plan": ["experiment=two_rooms"],
}
"""Arguments that are not refused, so that torch and our modules are imported, which need einops."""
PRESSED = "import os, signal; os.kill(os.getpid(), signal.SIGINT); signal.pause()"
"""In place of a package: Ctrl-C as it is imported, and an import that does not end by itself."""
WORK = """
import importlib, signal, sys
import jepa.cli.terminal as terminal

def work():
    try:
        signal.raise_signal(signal.SIGINT)
    finally:
        if {is_pressed_again}:
            signal.raise_signal(signal.SIGINT)

terminal.check_working_folder = work  # what every command calls first
sys.argv = ["jepa-{name}", *{arguments}]
sys.exit(importlib.import_module("jepa.cli.{name}").main({arguments}))
"""


def ended(folder: Path, *line: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT / "src")])}
    command = [sys.executable, *line]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "name"), [*(("yaml", name) for name in NAMES), *(("einops", name) for name in IMPORTING)]
)
def test_during_the_imports_one_line_answers_and_the_command_ends(package: str, name: str, tmp_path: Path) -> None:
    (tmp_path / f"{package}.py").write_text(PRESSED)
    done = ended(tmp_path, "-m", f"jepa.cli.{name}", *IMPORTING.get(name, []))
    assert done.returncode == 130, done.stderr
    assert "stopp" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("name", "is_pressed_again"), [*((name, False) for name in NAMES), ("eval", True)])
def test_during_the_work_one_line_answers_and_a_second_one_leaves(
    name: str, is_pressed_again: bool, tmp_path: Path
) -> None:
    arguments = ["lr"] if name == "find" else []
    done = ended(tmp_path, "-c", WORK.format(name=name, arguments=arguments, is_pressed_again=is_pressed_again))
    assert done.returncode == (-signal.SIGINT if is_pressed_again else 130), done.stderr
    answer, *rest = done.stderr.splitlines()
    assert answer == "stopping; press Ctrl-C again to stop now"
    assert [line.partition(": stopped")[0] for line in rest] == [f"jepa-{name}"] * (not is_pressed_again)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["make_dataset", "fit_heads"])
def test_where_nothing_has_to_be_ended_a_training_stops_at_once(where: str, tmp_path: Path) -> None:
    def run() -> int:
        setattr(jepa.agent, where, lambda *_, **__: signal.raise_signal(signal.SIGINT))
        jepa.agent._fit_heads = lambda *_: jepa.agent.fit_heads(*_)  # pyright: ignore
        return forked.command("train", [*TINY, "steps=2", "evaluator=[]", "name=x"])()

    assert forked.status(run, tmp_path, tmp_path / "output") == 130
    output = (tmp_path / "output").read_text()
    assert "\nstopping; press Ctrl-C again to stop now\njepa-train: stopped at once; " in output
    assert "Traceback" not in output


def test_a_run_answers_at_once_and_goes_on_to_the_end_of_its_step(capfd: pytest.CaptureFixture[str]) -> None:
    with listen() as interrupt:
        signal.raise_signal(signal.SIGINT)
        assert capfd.readouterr().err == "stopping after this step; press Ctrl-C again to stop now\n"
        with pytest.raises(Interrupted), interrupt.at_once():
            raise AssertionError("an evaluation begins after the signal")
        with pytest.raises(KeyboardInterrupt):  # a program of the user; a command ends
            signal.raise_signal(signal.SIGINT)


@pytest.mark.slow
def test_a_stopped_run_says_what_is_saved_and_how_it_goes_on(tmp_path: Path) -> None:
    def run() -> int:
        step = jepa.agent.Run.on_batch
        jepa.agent.Run.on_batch = lambda self, raw: (step(self, raw), signal.raise_signal(signal.SIGINT))[0]
        return forked.command("train", [*TINY, "steps=20", "evaluator=[]", "name=x"])()

    assert forked.status(run, tmp_path, tmp_path / "output") == 130
    output = (tmp_path / "output").read_text()
    assert "stopping after this step; press Ctrl-C again to stop now" in output
    assert "stopped; step 1 is saved in outputs/x/checkpoints, and the same command goes on" in output
