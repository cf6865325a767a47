"""Sweeps with any launcher: members and folders, errors before the start, failures, stopping and continuing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import yaml

from jepa.cli import sweep_plan
from jepa.cli.compare import main as compare_main
from jepa.cli.preflight import preflight
from jepa.cli.train import main
from jepa.config import Composer, ConfigError, TrainConfig, to_yaml
from jepa.config.catalogue import Catalogue, conf_folder
from jepa.errors import RunError
from jepa.runs.metrics import read_rows

FILES = Catalogue([conf_folder()]).groups["sweep"]
SHORT = ["name=found", "dataset.side=32", "mask=random", "logger=none", "evaluator=knn"]
EXPERIMENTS = {name: "cifar10_vit_tiny" if name == "blocks" else "quickstart" for name in FILES}


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[TrainConfig, str]]:
    """A folder to work in and an agent that only records what it should train."""
    runs: list[tuple[TrainConfig, str]] = []

    def train(config: TrainConfig, folder: Path, _interrupt: object) -> int:
        runs.append((config, folder.name))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run.json").write_text('{"status": "finished"}')
        (folder / "config.yaml").write_text(to_yaml(config))
        return 0

    agent = types.ModuleType("jepa.agent")
    vars(agent)["train"] = train
    monkeypatch.setitem(sys.modules, "jepa.agent", agent)
    monkeypatch.setattr(sys, "argv", ["jepa-train"])
    monkeypatch.chdir(tmp_path)
    return runs


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "argv", ["jepa-train"])
    monkeypatch.chdir(tmp_path)
    return tmp_path / "outputs/found"


def errors_of(*arguments: str) -> list[str]:
    with pytest.raises(ConfigError) as error:
        preflight(arguments)
    return error.value.errors


@pytest.mark.parametrize("name", FILES)
def test_every_file_goes_with_the_experiment_that_it_names(name: str) -> None:
    arguments = [f"sweep={name}", f"experiment={EXPERIMENTS[name]}"]
    assert f"# jepa-train --multirun {' '.join(arguments)}" in FILES[name].text or name == "recipe"
    composer = Composer()
    whole, unread = sweep_plan.with_sweep_files(composer, composer.parse(arguments)[0])
    assert not unread
    members = list(sweep_plan.member_overrides(composer, whole))
    assert [error for member in members for error in composer.check(member).errors] == []
    if "runs" in FILES[name].comment:
        assert FILES[name].comment.endswith(f"; {len(members)} runs")


def test_a_file_runs_its_combinations_in_folders_named_after_them(started: list) -> None:
    assert main(["--multirun", "sweep=blocks", "mask.num_targets=2", "image_size=224", "name=found"]) == 0
    assert [run.mask["target_scale"] for run, _ in started] == [[0.1, 0.15], [0.1, 0.2], [0.15, 0.3]]
    assert [folder for _, folder in started] == [
        f"mask.target_scale=[{s}]" for s in ("0.1,0.15", "0.1,0.2", "0.15,0.3")
    ]


def test_names_that_look_like_numbers_are_text_in_a_sweep(started: list) -> None:
    assert main(["--multirun", "name=007,1e3,on"]) == 0
    assert [run.name for run, _ in started] == ["007", "1e3", "on"]
    assert {"007", "1e3", "on"} <= {folder.name for folder in Path("outputs").iterdir()}


def test_a_name_in_a_file_that_is_no_text_is_refused_by_its_file(started: list, tmp_path: Path) -> None:
    for value in ("007", "1e3", "on", "[a]"):
        (tmp_path / "groups/experiment").mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups/experiment/bond.yaml").write_text(f"# @package _global_\nname: {value}\n")
        (error,) = errors_of("--config-dir", "groups", "experiment=bond")
        assert "experiment/bond.yaml" in error
    (tmp_path / "groups/experiment/bond.yaml").write_text("# @package _global_\nname: '007'\n")
    assert main(["--config-dir", "groups", "experiment=bond"]) == 0
    assert [run.name for run, _ in started] == ["007"]


def test_the_command_line_replaces_and_adds_to_what_a_file_varies(started: list) -> None:
    assert main(["-m", "sweep=lr", "experiment=quickstart", "lr=0.5", "objective.momentum=0.9,0.95", "seed=3"]) == 0
    assert [(r.lr, r.objective["momentum"], r.seed) for r, _ in started] == [(0.5, 0.9, 3), (0.5, 0.95, 3)]
    assert [folder for _, folder in started] == ["objective.momentum=0.9", "objective.momentum=0.95"]


def test_what_a_file_fixes_holds_for_all_its_runs(started: list) -> None:
    assert main(["-m", "sweep=batch", "experiment=quickstart", "lr=1e-3", "batch_size=32,128"]) == 0
    assert [(run.batch_size, run.steps, run.epochs) for run, _ in started] == [(n, None, 10) for n in (32, 128)]
    assert {run.objective["momentum_batch_size"] for run, _ in started} == {64}


def test_all_errors_of_all_combinations_are_printed_before_anything_starts(started: list) -> None:
    found = errors_of("-m", "sweep=predictor", "experiment=quickstart", "predictor.num_heads=5", "epohcs=1", "lr=0,1")
    assert sum("predictor.width" in error for error in found) == 3
    assert any("epohcs" in error for error in found)
    assert any(error.startswith("lr=0: ") for error in found)
    assert not started


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["sweep=lr"], "sweep=lr: starts several runs, which needs --multirun"),
        (["-m", "sweep=lr,mask"], "sweep=lr,mask: only one sweep file can be selected"),
        (["-m", "sweep=optuma"], 'sweep=optuma: no such choice; did you mean "optuna"?'),
    ],
)
def test_a_file_that_cannot_be_run_so_is_refused(arguments: list[str], expected: str) -> None:
    (found,) = errors_of(*arguments)
    assert found.startswith(expected)


def test_of_a_sampler_every_value_and_both_ends_of_an_interval_are_checked() -> None:
    arguments = ["-m", "sweep=optuna", "experiment=quickstart"]
    assert errors_of(*arguments, "lr=interval(-1,1)") == ["lr=-1.0: must be above 0"]
    found = errors_of(*arguments, "predictor.width=choice(48,50)", "mask.ratio=interval(0.4,1.5)")
    assert [error.split(":")[0] for error in found] == ["mask.ratio=1.5", "predictor.width=50"]


@pytest.mark.parametrize("has_others", [True, False])
def test_a_sampler_that_is_not_installed_is_named_with_its_command(
    has_others: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find_spec(name: str) -> None:
        if not has_others:
            raise ModuleNotFoundError("No module named 'hydra_plugins'")

    monkeypatch.setattr(sweep_plan, "find_spec", find_spec)
    assert errors_of("-m", "sweep=optuna") == ["sweep=optuna: optuna is not installed: pip install 'jepa-train[sweep]'"]
    for launcher, extra in {"joblib": "sweep", "local": "sweep", "slurm": "slurm"}.items():
        (found,) = errors_of("-m", f"hydra/launcher={launcher}", "seed=1,2")
        assert found == f"hydra/launcher={launcher}: {launcher} is not installed: pip install 'jepa-train[{extra}]'"


def test_slurm_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_plan.shutil, "which", lambda name: None)
    (found,) = errors_of("-m", "hydra/launcher=slurm", "seed=1,2")
    assert found.startswith("hydra/launcher=slurm: there is no sbatch here")


def test_a_wrong_key_of_a_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_plan.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert any("partiton" in error for error in errors_of("-m", "hydra/launcher=slurm", "hydra.launcher.partiton=gpu"))


def finish(config: TrainConfig, folder: Path) -> int:
    """Write the files of a finished run."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"step": s, "epoch": 0, "samples": 4 * s, "train/loss": 1 / s, "probe/knn_top1": s} for s in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run.json").write_text('{"status": "finished"}')
    (folder / "config.yaml").write_text(to_yaml(config))
    return 0


GRID = ["-m", "experiment=quickstart", "name=found", "lr=1e-3,1e-4,3e-4"]


def test_one_failure_ends_no_other_member_and_is_printed_at_once_and_in_the_end(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    begun: list[float] = []

    def train(config: TrainConfig, folder: Path, _interrupt: object) -> int:
        begun.append(config.lr)
        if config.lr == 1e-4:
            raise RunError("the loss of step 2 is nan: lower lr")
        return finish(config, folder)

    monkeypatch.setitem(sys.modules, "jepa.agent", types.SimpleNamespace(train=train))
    assert main(GRID) == 1
    assert begun == [1e-3, 1e-4, 3e-4]
    printed = capfd.readouterr()
    failure = "the loss of step 2 is nan: lower lr"
    assert f"jepa-train: outputs/found/lr=0.0001: {failure}" in printed.err
    assert f"jepa-train: outputs/found/lr=0.0001 failed: {failure}" in printed.err
    lines = [[cell.strip() for cell in line.split("  ")] for line in printed.out.splitlines()[1:4]]
    assert [(line[0], line[-1]) for line in lines] == [
        ("finished", "outputs/found/lr=0.001"),
        ("failed", "outputs/found/lr=0.0001, see outputs/found/lr=0.0001/output.log"),
        ("finished", "outputs/found/lr=0.0003"),
    ], printed.out
    assert "kNN 2.0 %" in printed.out
    assert "JEPA with SpatialEncoder" not in printed.out + printed.err
    log = (workplace / "lr=0.0001/output.log").read_text()
    assert "JEPA with SpatialEncoder" in log
    assert failure in log
    assert f"as a page: jepa-compare {workplace.relative_to(Path.cwd())}" in printed.out
    assert compare_main([str(workplace)]) == 0
    table = capfd.readouterr().out
    assert "lr=0.001" in table

    def succeed(config: TrainConfig, folder: Path, _interrupt: object) -> int:
        begun.append(config.lr)
        return finish(config, folder)

    monkeypatch.setitem(sys.modules, "jepa.agent", types.SimpleNamespace(train=succeed))
    assert main(GRID) == 0, "the same command again"
    assert begun[3:] == [1e-4], "what is finished is left as it is"
    again = capfd.readouterr().out.splitlines()[1].split()
    assert again == ["finished", "kNN", "2.0", "%", "before", "outputs/found/lr=0.001"]


def test_a_signal_ends_the_whole_sweep_with_its_status(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    begun: list[float] = []

    def train(config: TrainConfig, folder: Path, _interrupt: object) -> int:
        begun.append(config.lr)
        return finish(config, folder) if len(begun) == 1 else 128 + signal.SIGTERM

    monkeypatch.setitem(sys.modules, "jepa.agent", types.SimpleNamespace(train=train))
    assert main(GRID) == 128 + signal.SIGTERM
    assert begun == [1e-3, 1e-4]
    assert "run the same command again to continue" in capfd.readouterr().err

    def killed(config: TrainConfig, folder: Path, _interrupt: object) -> int:
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("it goes on")

    monkeypatch.setitem(sys.modules, "jepa.agent", types.SimpleNamespace(train=killed))
    assert main(GRID) == 128 + signal.SIGINT, "before the training listens"


@pytest.mark.slow
def test_members_beside_each_other_share_the_cores_and_save_when_the_sweep_is_stopped(
    tmp_path: Path, tiny: list[str]
) -> None:
    endless = ["steps=100000", "save_every=1000000", "eval_every=1000000", "device=cpu", "seed=1,2,3"]
    command = [sys.executable, "-m", "jepa.cli.train", "-m", "hydra/launcher=local", *SHORT, *tiny, *endless]
    folders = [tmp_path / f"outputs/found/seed={seed}" for seed in (1, 2, 3)]
    with (tmp_path / "output").open("w+") as file:
        sweep = subprocess.Popen(command, cwd=tmp_path, stdout=file, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + 200
            while not all((f / "metrics.jsonl").exists() and len(read_rows(f)) > 3 for f in folders[:2]):
                assert time.monotonic() < deadline
                assert sweep.poll() is None
                time.sleep(0.2)
        finally:
            sweep.terminate()
            sweep.wait(timeout=100)
        file.seek(0)
        printed = file.read()
    assert sweep.returncode == 128 + signal.SIGTERM, printed
    for folder in folders[:2]:
        assert json.loads((folder / "run.json").read_text())["status"] == "stopped"
        assert (folder / "checkpoints/last").exists()
    assert not (folders[2] / "run.json").exists(), "no other begins"
    assert "Traceback" not in printed


@pytest.mark.slow
def test_a_grid_of_two_trains_both(workplace: Path, tiny: list[str]) -> None:
    assert main(["--multirun", "sweep=lr", "lr=1e-3", "objective.momentum=0.97,0.99", *SHORT, *tiny]) == 0
    for momentum in (0.97, 0.99):
        rows = read_rows(workplace / f"objective.momentum={momentum}")
        assert [row["step"] for row in rows if "train/loss" in row] == [1, 2]
        assert rows[-1]["step"] == 2


def test_a_sweep_of_estimates_prints_each_and_misses_no_run(
    workplace: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--multirun", "estimate=true", "batch_size=8,16", *SHORT, *tiny[:1], *tiny[2:]]) == 0
    printed = capsys.readouterr()
    assert printed.out.count("calculated, not measured") == 2
    assert "is not finished" not in printed.err
    assert not list(workplace.rglob("run.json"))


@pytest.mark.slow
def test_optuna_gets_the_selection_metric(workplace: Path, tiny: list[str]) -> None:
    fixed = [text for text in tiny if not text.startswith("predictor")]
    varied = ["predictor.width=choice(16,32)", "predictor.depth=1", "predictor.num_heads=2", "hydra.sweeper.n_trials=2"]
    assert main(["--multirun", "sweep=optuna", *SHORT, *fixed, *varied]) == 0
    found = yaml.safe_load((workplace / "optimization_results.yaml").read_text())
    runs = {folder.name: read_rows(folder) for folder in workplace.iterdir() if folder.is_dir()}
    assert len(runs) == 2
    judged = [[row["probe/knn_top1"] for row in rows if "probe/knn_top1" in row][-1] for rows in runs.values()]
    assert found["best_value"] == max(judged)
    assert set(found["best_params"]) == {"lr", "objective.momentum", "mask.ratio", "predictor.width"}
