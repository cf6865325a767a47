"""The command without its training: errors, help, completion, and the configuration of the run."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

from jepa.cli.help import help_text
from jepa.cli.terminal import quick_imports
from jepa.cli.train import main
from jepa.config import ConfigError, TrainConfig, compose, to_yaml
from jepa.config.attributes import JEPAConfig
from jepa.config.catalogue import Catalogue, conf_folder

Runs = list[tuple[TrainConfig, Path]]


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    """A folder to work in and an agent that only records what it should train; seed=143 is a stopped run."""
    started: Runs = []

    def train(config: TrainConfig, folder: Path, _interrupt: object) -> int:
        started.append((config, folder))
        if config.seed == 13:
            raise ConfigError(["batch_size=64: the data set has 13 images"])
        return config.seed if config.seed == 143 else 0

    agent = types.ModuleType("jepa.agent")
    vars(agent)["train"] = train
    monkeypatch.setitem(sys.modules, "jepa.agent", agent)
    monkeypatch.setattr(sys, "argv", ["jepa-train"])
    monkeypatch.chdir(tmp_path)
    return started


def test_refusal_lists_all_errors_and_leaves_nothing_behind(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["epohcs=3", "mask=blok", "image_size=225", "--mutlirun", "--epochs=3"])
    printed = capsys.readouterr()
    assert (status, printed.out, runs, os.listdir()) == (2, "", [], [])
    lines = printed.err.splitlines()
    assert lines[0] == "jepa-train: 5 errors in the configuration, nothing was started"
    assert '  --mutlirun: there is no such flag; did you mean "--multirun"?' in lines
    assert "  --epochs=3: there is no such flag; keys are given without dashes, as epochs=3" in lines
    assert '  epohcs=3: there is no key "epohcs"; did you mean "epochs"?' in lines


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "status"), [(["nonsense=1"], 2), (["--help"], 0), (["mask=temporal"], 2)])
def test_answers_come_without_torch(arguments: list[str], status: int, tmp_path: Path) -> None:
    program = f"""
import sys
from jepa.cli.train import main
assert main({arguments!r}) == {status}
heavy = {{"torch", "numpy", "timm", "wandb"}} & set(sys.modules)
assert not heavy, heavy
"""
    found = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert "Traceback" not in found.stderr


def test_command_trains_what_python_would(runs: Runs) -> None:
    assert main(["mask=random", "lr=3e-4", "encoder.depth=6", "name=same"]) == 0
    overrides = ["mask=random", "lr=3e-4", "encoder.depth=6", "name=same"]
    assert runs == [(compose(overrides), Path("outputs/same"))]
    assert runs[0][0] == JEPAConfig("mask=random", "encoder.depth=6", lr=3e-4, name="same").compose()


def test_run_is_named_by_its_choices(runs: Runs) -> None:
    main(["dataset=cifar10", "size=base"])
    assert (runs[0][0].name, runs[0][1]) == ("jepa-cifar10", Path("outputs/jepa-cifar10"))


def test_run_folder_holds_nothing_of_hydra(runs: Runs) -> None:
    main(["name=clean"])
    assert os.listdir("outputs/clean") == []
    assert os.getcwd() == str(Path.cwd())


def test_late_error_is_printed_like_an_early_one(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["seed=13"])
    assert end.value.code == 2
    assert capsys.readouterr().err.endswith(
        "\njepa-train: 1 error in the configuration, nothing was started\n  batch_size=64: the data set has 13 images\n"
    )


def test_exit_status_of_a_stopped_run_is_passed_on(runs: Runs) -> None:
    with pytest.raises(SystemExit) as end:
        main(["seed=143"])
    assert end.value.code == 143


def test_sweep_runs_every_combination_in_a_folder_of_its_own(runs: Runs) -> None:
    assert main(["name=sweep", "mask=block,random", "--multirun", "lr=1e-4,3e-4"]) == 1  # this agent finishes nothing
    assert [(config.mask["_target_"].rpartition(".")[2], config.lr) for config, _ in runs] == [
        ("BlockMasker", 1e-4),
        ("BlockMasker", 3e-4),
        ("RandomMasker", 1e-4),
        ("RandomMasker", 3e-4),
    ]
    assert str(runs[1][1]) == "outputs/sweep/lr=0.0003,mask=block"


def test_sweep_is_refused_when_one_member_is_wrong(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-m", "mask=block,random", "image_size=224,225", "lr=1e-4,-1", "size=choice(tiny,hueg)"]) == 2
    printed = capsys.readouterr().err
    assert printed.count("225 is not divisible by 16") == 1
    assert "lr=-1: must be above 0" in printed
    assert 'size=hueg: no such choice; did you mean "huge"?' in printed
    assert not runs


def test_sweep_with_resume_false_looks_into_the_folder_of_each_member(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("outputs/sweep/seed=2").mkdir(parents=True)
    Path("outputs/sweep/seed=2/config.yaml").touch()
    assert main(["-m", "name=sweep", "seed=1,2", "resume=false"]) == 2
    assert "outputs/sweep/seed=2 holds a run already (config.yaml)" in capsys.readouterr().err


@pytest.fixture
def own_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the user: a mask whose class is in their own package, and an experiment with mistakes."""
    for name, text in {
        "groups/mask/mine.yaml": "# hides every second token\n_target_: my_masks.Mine\nshare: 0.5\n",
        "groups/experiment/slips.yaml": (
            "# @package _global_\n# all wrong\nepohcs: 3\nlr: fast\nencoder:\n  depht: 4\nimage_size: 225\n"
        ),
        "groups/start.yaml": "defaults:\n  - train\n  - override size: tiny\n  - _self_\nepochs: 7\n",
        "my_masks.py": "import torch\n\nclass Mine:\n    def __init__(self, *, grid, share: float): ...\n",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "groups"


def test_own_groups_are_offered_used_and_explained(runs: Runs, own_groups: Path) -> None:
    assert main(["--config-dir", "groups", "mask=mine", "mask.share=0.25"]) == 0
    assert runs[0][0].mask == {"_target_": "my_masks.Mine", "share": 0.25}
    assert runs[0][0] == compose(["mask=mine", "mask.share=0.25"], config_dir=own_groups)
    assert "mine               hides every second token" in help_text(["--config-dir", str(own_groups), "--help"])


def test_own_component_is_held_to_its_signature(
    runs: Runs, own_groups: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config-dir=groups", "mask=mine", "mask.share=half", "+mask.shares=2"]) == 2
    printed = capsys.readouterr().err
    assert "mask.share=half: takes a number, not the text 'half'" in printed
    assert "+mask.shares=2: Mine has no 'shares'; did you mean \"share\"?" in printed


def test_all_slips_in_a_file_are_found_and_the_file_is_named(
    runs: Runs, own_groups: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config-dir", "groups", "experiment=slips"]) == 2
    printed = capsys.readouterr().err
    for slip in ("epohcs=3", "lr=fast", "encoder.depht=4", "image_size=225"):
        assert f"  {slip} (experiment/slips.yaml)" in printed


def test_own_primary_configuration_builds_on_ours(runs: Runs, own_groups: Path) -> None:
    assert main(["--config-dir", "groups", "--config-name", "start"]) == 0
    assert (runs[0][0].epochs, runs[0][0].encoder["embed_dim"], runs[0][1]) == (7, 192, Path("outputs/jepa-shapes"))


def test_written_configuration_can_be_run_again(runs: Runs) -> None:
    first = compose(["size=tiny", "mask=random", "name=first", "image_size=[32,64]"])
    Path("kept").mkdir()
    Path("kept/config.yaml").write_text(to_yaml(first))
    assert main(["--config-dir", "kept", "--config-name", "config"]) == 0
    assert runs == [(first, Path("outputs/first"))]


def test_missing_config_dir_is_an_error(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config-dir", "nowhere"]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_help_names_every_group_choice_and_key() -> None:
    text = help_text()
    for group, choices in Catalogue([conf_folder()]).groups.items():
        assert f"\n  {group}=\n" in text
        assert not [name for name in choices if not re.search(rf"^ +\*? ?{name}( |$)", text, re.MULTILINE)]
    for key in vars(compose()).keys() - {"chosen"}:  # which the program writes
        assert f"  {key}=" in text or f"  {key}." in text


def test_configuration_is_shown_instead_of_run_even_when_something_must_still_be_given(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--cfg", "job", "dataset=hf"]) == 0
    assert "path: ???" in capsys.readouterr().out
    assert not runs


@pytest.mark.parametrize(("line", "expected"), [("mask=", "mask=block"), ("encoder.pat", "encoder.patch_size=")])
def test_shell_completes_groups_choices_and_keys(
    line: str, expected: str, runs: Runs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COMP_LINE", f"jepa-train {line}")
    main(["-sc", "query=bash"])
    assert expected in capsys.readouterr().out


@pytest.mark.slow
def test_installed_command_answers_from_any_folder(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).parent / "jepa-train"), "epohcs=3"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.startswith("jepa-train: 1 error in the configuration")


def test_imports_of_torch_are_made_without_the_collector_which_leaves_them_alone_afterwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    frozen = []
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(gc.isenabled()))
    monkeypatch.setitem(sys.modules, "torch", types.ModuleType("torch"))
    with quick_imports():
        assert gc.isenabled()
    monkeypatch.delitem(sys.modules, "torch")
    with quick_imports():
        assert not gc.isenabled()
    assert gc.isenabled()
    assert frozen == [False]
