"""What every command has: help after choices, its version, completion, its configuration, a run that stands first."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from jepa.cli.help import help_text
from jepa.cli.overrides import with_run
from jepa.cli.train import main as train
from jepa.config import ConfigError, compose, compose_collect, compose_embed, compose_eval, compose_export
from jepa.config.catalogue import Catalogue, Choice, conf_folder
from jepa.config.machine import check_start, check_writable
from jepa.config.overrides import override_literal
from jepa.config.schema import ExportConfig
from jepa.errors import RunError
from jepa.training.find_lr import rerun_command

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
GROUPS = Catalogue([conf_folder()]).groups
CHOICES = [choice for group in GROUPS.values() for choice in group.values()]
WITHOUT_DATA = [
    "dataset=imagefolder", "dataset=videofolder encoder=temporal mask=tube", "dataset=frames", "dataset=voc",
    "dataset=coco", "dataset=webdataset dataset.shards=none.tar", "dataset=hf dataset.path=some/where",
    "dataset=cifar10",
    "dataset=episodes dataset.path=none objective=dynamics predictor=action mask=none",
]  # fmt: skip


@pytest.fixture(params=sorted(SCRIPTS))
def program(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [request.param])
    return request.param


def write_stub_run(**sections: object) -> None:
    """outputs/x: a run as far as commands look before they import torch."""
    checkpoint = Path("outputs/x/checkpoints/step_00000001")
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text('{"step": 1}')
    config = {"image_size": 32, "dataset": {}, "objective": {"_target_": "jepa.objectives.mae.MAE"}, **sections}
    (checkpoint / "config.yaml").write_text(yaml.safe_dump(config))


def main_of(program: str) -> Callable[[list[str]], int]:
    return importlib.import_module(SCRIPTS[program].partition(":")[0]).main


def test_every_command_says_its_version(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main_of(program)(["--version"]) == 0
    assert re.match(rf"{program} \d+\.\d+", capsys.readouterr().out)


def test_every_command_completes_in_the_shell(
    program: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main_of(program)(["-sc", "install=bash"]) == 0
    assert f"hydra_bash_completion {program}" in capsys.readouterr().out
    keys = {"jepa-embed": "images", "jepa-export": "format", "jepa-predict": "images", "jepa-play": "actions"}
    key = keys.get(program, "seed")
    monkeypatch.setenv("COMP_LINE", f"{program} {key[:-1]}")
    monkeypatch.setenv("COMP_POINT", str(len(f"{program} {key[:-1]}")))
    main_of(program)(["-sc", "query=bash"])
    assert f"{key}=" in capsys.readouterr().out.split()


def test_every_command_shows_its_configuration(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main_of(program)(["--cfg", "job"]) == 0
    assert [type(config) for config in yaml.safe_load_all(capsys.readouterr().out)] == [dict]
    assert not os.listdir(".")


@pytest.mark.parametrize("kind", ["hydra", "all"])
def test_every_command_shows_the_settings_of_hydra(program: str, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = {"jepa-compare": ["seed=0,1"], "jepa-rl": ["seed=0,1"], "jepa-find": ["lr"]}.get(program, [])
    assert main_of(program)([*given, "--cfg", kind]) == 0
    assert "job_logging" in yaml.safe_load(capsys.readouterr().out)["hydra"]
    assert not os.listdir(".")


@pytest.mark.parametrize(
    ("program", "given", "count"),
    [
        ("jepa-compare", ["objective=jepa"], 1),
        ("jepa-compare", ["objective=jepa,mae"], 2),
        ("jepa-compare", ["compare=two_rooms"], 6),  # whose dataset.path is missing
        ("jepa-train", ["--multirun", "seed=0,1"], 2),
        ("jepa-train", ["--multirun", "sweep=lr"], 9),
        ("jepa-rl", ["seed=0,1"], 2),
    ],
)
def test_commands_that_start_several_runs_show_each(
    program: str, given: list[str], count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [program])
    assert main_of(program)([*given, "--cfg", "job"]) == 0
    assert len([config for config in yaml.safe_load_all(capsys.readouterr().out) if config]) == count
    assert not os.listdir(".")


def test_a_configuration_is_shown_though_its_folder_holds_another_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for member in ("x", "x/seed=0"):
        Path("outputs", member, "checkpoints/step_00000001").mkdir(parents=True)
        Path("outputs", member, "config.yaml").write_text("lr: 7\n")
    assert train(["name=x", "resume=false", "--cfg", "job"]) == 0
    assert main_of("jepa-compare")(["name=x", "seed=0,1", "--cfg", "job"]) == 0
    assert capsys.readouterr().out


def test_an_evaluation_is_shown_on_the_data_of_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_stub_run(dataset={"_target_": "jepa.data.images.ImageFolder", "root_path": "gone"})
    assert main_of("jepa-eval")(["outputs/x", "--cfg", "job"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["dataset"]["root_path"] == "gone"


@pytest.mark.parametrize("program", ["jepa-compare", "jepa-find", "jepa-train"])
def test_an_estimate_trains_nothing(
    program: str, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [program])
    several = {"jepa-compare": ["seed=0,1"], "jepa-find": ["lr"]}.get(program, [])
    for given in ([], several):
        words = [*given, *["lr"] * (program == "jepa-find" and not given)]
        assert main_of(program)([*words, *tiny, "batch_size=8", "estimate=true"]) == 0
        expected = 2 if program == "jepa-compare" and given else 1
        assert capsys.readouterr().out.count("calculated, not measured") == expected
    assert not os.listdir(".")


def test_every_command_names_these_flags_in_its_help(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    with suppress(SystemExit):  # of argparse
        assert main_of(program)(["--help"]) == 0
    text = capsys.readouterr().out
    assert [flag for flag in ("--cfg", "-sc", "--version", "--config-dir") if flag not in text] == []


def test_help_after_choices_shows_their_keys_with_the_comments_of_their_files() -> None:
    lines = help_text(["encoder=temporal", "mask=tube"]).splitlines()
    for group, name in (("encoder", "temporal"), ("mask", "tube")):
        choice = GROUPS[group][name]
        assert f"   * {name:<18} {choice.comment}" in lines
        for key, comment in re.findall(r"^(?:  )?(\w+):.* # (.*)$", choice.text, re.MULTILINE):
            assert any(line.strip().startswith(f"{group}.{key}=") and line.endswith(comment) for line in lines), key
    assert any(line.startswith("   * transformer") for line in lines), "a group that is not typed keeps its default"


def test_help_after_an_experiment_marks_its_choices() -> None:
    text = help_text(["experiment=small_folder"])
    assert "   * none               Nothing is hidden" in text
    assert re.search(r"^ +augment\.flip=true +false where", text, re.MULTILINE)


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: f"{choice.group}={choice.name}")
def test_every_choice_has_a_line_in_the_help(choice: Choice) -> None:
    assert choice.comment
    assert not choice.comment.startswith(("jepa-", "@"))


@pytest.mark.parametrize("choice", [c for c in CHOICES if c.group in ("mask", "encoder", "size", "optimizer", "schedule", "predictor")], ids=lambda choice: choice.label)  # fmt: skip  # noqa: E501
def test_keys_of_common_groups_have_comments(choice: Choice) -> None:
    lines = re.findall(r"^(?:  )?([a-z]\w*: *[^\s#][^\n]*)$", choice.text, re.MULTILINE)
    assert [line for line in lines if " #" not in line] == []


@pytest.mark.parametrize("overrides", WITHOUT_DATA)
def test_a_configuration_is_shown_without_its_data(
    overrides: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert train([*overrides.split(), "--cfg", "job"]) == 0
    assert "_target_" in yaml.safe_load(capsys.readouterr().out)["dataset"]


@pytest.mark.parametrize("dataset", ["imagefolder", "cifar10", "hf dataset.path=some/where"])
def test_an_estimate_needs_no_data_and_says_what_it_assumes(
    dataset: str, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["jepa-train"])
    assert train([*f"dataset={dataset}".split(), *tiny, "batch_size=8", "estimate=true"]) == 0
    assert "assumed: 1,281,167 samples of 3 channels in 1,000 classes, as the data are not" in capsys.readouterr().out
    assert not Path("data").exists()


@pytest.mark.parametrize(
    ("overrides", "assumed"),
    [
        (
            "dataset=coco objective=detect objective.width=32 precision=fp32",
            "118,287 samples of 3 channels in 80 classes",
        ),
        ("dataset=voc objective=detect objective.head=fcos objective.width=32 dataset.classes=[a,b]", "in 2 classes"),
        (
            "experiment=two_rooms",
            "78,750 samples of 1 channel, actions of 2 numbers of TwoRooms, episodes of full length",
        ),
        (
            "experiment=two_rooms dataset.env=null dataset.episodes=null",
            "100,000 samples of 3 channels, actions of 2 num",
        ),
    ],
)
def test_an_estimate_needs_neither_boxes_nor_episodes(
    overrides: str, assumed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["jepa-train"])
    small = ["size=tiny", "image_size=64", "encoder.patch_size=16", "batch_size=8", "encoder.depth=1"]
    assert train([*overrides.split(), *small, "estimate=true"]) == 0
    text = capsys.readouterr().out
    assert re.search(rf"assumed: .*{re.escape(assumed)}", text)
    assert "all steps" in text
    assert not os.listdir(".")


def test_a_run_may_stand_first() -> None:
    assert with_run(["outputs/x", "task=knn"]) == ["run=outputs/x", "task=knn"]
    assert with_run(["outputs/x", "outputs/y 2"]) == ["run=[outputs/x,'outputs/y 2']"]
    assert with_run(["task=knn", "--config-dir", "x"]) == ["task=knn", "--config-dir", "x"]


def test_a_run_whose_name_looks_like_an_override_may_stand_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("outputs/lr=1e-3").mkdir(parents=True)
    assert with_run(["outputs/lr=1e-3"]) == [f"run={override_literal('outputs/lr=1e-3')}"]


@pytest.mark.parametrize("name", ["eval", "embed", "predict", "export", "plan", "play", "finetune"])
def test_commands_that_take_a_run_take_it_first(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip  # noqa: E501
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"jepa-{name}"])
    assert main_of(f"jepa-{name}")(["outputs/nowhere"]) == 2
    error = capsys.readouterr().err
    assert "outputs/nowhere" in error
    assert "cannot be read" not in error


def test_the_command_of_a_finder_keeps_the_folder_of_configurations() -> None:
    given = ["--config-dir", "my conf", "experiment=quickstart", "lr=1"]
    assert rerun_command(given, lr="0.1") == "  jepa-train --config-dir 'my conf' experiment=quickstart lr=0.1"


def test_a_missing_package_is_refused_before_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("v").mkdir()
    Path("v/1.mp4").touch()
    hidden = {"datasets", "tensorboard", "minigrid", "av", "torchcodec", "onnx", "onnxruntime", "transformers"}
    monkeypatch.setattr("jepa.config.machine.find_spec", lambda name: None if name in hidden else find_spec(name))
    configs = {
        "datasets: pip install 'jepa-train[hf]'": compose(["dataset=hf", "dataset.path=a/b"]),
        "tensorboard: pip install 'jepa-train[tensorboard]'": compose(["logger=tensorboard"]),
        "minigrid: pip install 'jepa-train[envs]'": compose_collect(["env=minigrid_empty"]),
    }
    for expected, config in configs.items():
        with pytest.raises(ConfigError) as refused:
            check_start(config)
        assert expected in str(refused.value)
    export = partial(ExportConfig, run="r", output=None, push_to_hub=None)
    for expected, config in {
        "format=onnx: needs onnx and onnxruntime": export(format="onnx"),
        "format=transformers: needs transformers": export(format="transformers"),
        "videos=v: videos need av or torchcodec": compose_embed(["run=timm:x", "videos=v", "out=f.npz"]),
    }.items():
        with pytest.raises(ConfigError, match=expected):
            check_start(config)
    check_start(export(format="timm"))
    videos = {"_target_": "jepa.data.videos.VideoFolder", "root_path": "none", "video_folder": "."}
    with pytest.raises(ConfigError, match=r"needs av or torchcodec: pip install 'jepa-train\[video\]'"):
        check_start(replace(compose([]), dataset=videos))


class TestOutputFolder:
    @pytest.fixture(autouse=True)
    def _here(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)

    def test_a_file_in_its_place_is_named(self) -> None:
        Path("outputs").touch()
        with pytest.raises(RunError, match="outputs/x: Not a directory"):
            check_start(compose(["name=x"]))
        with pytest.raises(RunError, match="outputs/"):
            check_start(compose_eval(["run=pixels", "image_size=32", "dataset=shapes"]))

    @pytest.mark.parametrize(("free", "is_writable", "reason"), [(0, True, "No space left"), (9, False, "denied")])
    def test_a_full_or_closed_disk_is_named(self, free: int, is_writable: bool, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip  # noqa: E501
        status = type("Status", (), {"f_bavail": free, "f_flag": 0})
        monkeypatch.setattr(os, "statvfs", lambda path: status)
        monkeypatch.setattr(os, "access", lambda path, mode: is_writable)
        with pytest.raises(RunError, match=f"outputs/x: .*{reason}"):
            check_writable(Path("outputs/x"))

    def test_the_folder_of_a_file_is_looked_at(self) -> None:
        Path("photos").mkdir()
        Path("photos/1.jpg").touch()
        Path("closed").touch()
        config = compose_embed(["run=timm:x", "images=photos", "out=features.npz"])
        check_start(config)
        with pytest.raises(RunError, match="closed"):
            check_start(replace(config, out="closed/features.npz"))
        with pytest.raises(RunError, match="closed/timm: Not a directory"):
            check_start(ExportConfig(run="timm:x", format="timm", output="closed/timm", push_to_hub=None))


@pytest.mark.parametrize("format", ["timm", "transformers", "onnx"])
def test_an_export_that_no_model_can_hold_is_refused_before_the_start(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_stub_run(encoder={"stem": "dictionary"})
    if format == "onnx":
        assert compose_export(["run=outputs/x", "format=onnx"]).format == "onnx"
        return
    with pytest.raises(ConfigError, match=r"encoder.stem=dictionary.*use safetensors or onnx or torch_export"):
        compose_export(["run=outputs/x", f"format={format}"])


@pytest.mark.slow
@pytest.mark.parametrize("arguments", ["train device=cuda", "train dataset=imagefolder dataset.root_path=empty size=tiny", "eval run=pixels image_size=32 dataset=shapes device=cuda"])  # fmt: skip  # noqa: E501
def test_what_needs_no_torch_to_be_refused_is_refused_without_it(arguments: str, tmp_path: Path) -> None:
    (tmp_path / "empty" / "train").mkdir(parents=True)
    name, *overrides = arguments.split()
    program = (
        f"import sys; from jepa.cli.{name} import main\n"
        "try: status = main(sys.argv[1:])\n"
        "except SystemExit as exit: status = exit.code\n"
        "assert 'torch' not in sys.modules; sys.exit(status)"
    )
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program, *overrides], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)  # fmt: skip  # noqa: E501
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
