"""jepa-collect: what it prints, refuses and resumes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from jepa.cli.collect import main
from jepa.config import ConfigError, compose_collect
from jepa.config.catalogue import conf_folder
from jepa.config.command_rules import RECORDINGS
from jepa.data.episode_store import EpisodeStore
from jepa.data.exchange import READERS, WRITERS

SMALL = ["episodes=3", "steps=4"]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_episodes_are_collected_once_and_summed_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(SMALL) == 0
    heads, row = capsys.readouterr().out.splitlines()
    assert heads.split() == ["episodes", "steps", "mean", "return", "terminated", "size", "frames/s"]
    assert re.fullmatch(r"outputs/two_rooms-sticky_random +3 +12 +0\.000 +0\.000 +\d+\.\d MB +\d+", row)
    assert main(SMALL) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[-1] == "-"
    assert len(EpisodeStore(Path("outputs/two_rooms-sticky_random"))) == 3


def test_the_expert_is_rewarded_in_every_episode(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["policy=expert", "episodes=5", "steps=60", "name=e"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[3:5] == ["1.000", "1.000"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["env=two_room"], 'did you mean "two_rooms'),
        (["env.wals=random"], 'did you mean "env.walls"'),
        (["env.walls=open"], "valid: fixed, random"),
        (["policy.keep=2"], "must be from 0 to 1"),
        (["episodes=0"], "at least 1"),
        (["env=gym"], "env.id=VALUE"),
        (["name=../x"], "below outputs/"),
        (["source=lerobot"], "takes KIND:PATH"),
        (["export=lerobot"], "takes KIND:PATH"),
        (["export=minary:x"], 'did you mean "minari"?'),
        (["source=minari:x"], "give name=NAME"),
    ],
)
def test_mistakes_are_refused_in_words(overrides: list[str], expected: str, capsys) -> None:
    assert main(overrides) == 2
    assert expected in capsys.readouterr().err
    assert not Path("outputs").exists()


def test_an_unknown_id_is_refused_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gymnasium")
    assert main(["env=gym", "env.id=CartPole-v7"]) == 2
    assert "CartPole-v1" in capsys.readouterr().err


def test_other_settings_in_the_same_folder_are_refused_with_both(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "name=a"]) == 0
    assert main([*SMALL, "name=a", "env=two_rooms_random", "seed=3"]) == 1
    assert "env.walls=fixed, seed=0, and env.walls=random, seed=3 was asked for" in capsys.readouterr().err


def test_formats_are_refused_before_anything_is_collected_by_the_names_that_are_read_and_written() -> None:
    assert set(RECORDINGS) == READERS.keys() == WRITERS.keys()


def test_episodes_are_exported_and_imported_again(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("h5py")
    assert main([*SMALL, "env.channels=3", "name=a", "export=minari:exported"]) == 0
    assert main(["name=b", "source=minari:exported"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[1:3] == ["3", "12"]
    a, b = (EpisodeStore(Path("outputs", name)).episode(2) for name in "ab")
    assert (a.frames == b.frames).all()
    assert (a.actions == b.actions).all()


def test_all_errors_come_at_once() -> None:
    with pytest.raises(ConfigError) as refusal:
        compose_collect(["episodes=x", "env.walls=open", "seed=-1"])
    assert len(refusal.value.errors) == 3


def test_a_numeric_name_stays_text() -> None:
    assert compose_collect(["name=007"]).name == "007"


def test_help_lists_the_environments(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    names = [path.stem for group in ("env", "policy") for path in (conf_folder() / group).glob("*.yaml")]
    assert all(name in text for name in names)


@pytest.mark.slow
def test_torch_is_not_imported() -> None:
    program = f"import sys; from jepa.cli.collect import main; main({SMALL}); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
