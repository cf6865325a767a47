"""jepa-compare: the runs are planned, checked, trained and resumed, and their results are compared."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import yaml
from hostile_text import HOSTILE, count_as_text
from synthetic_run import write_run
from wandb_reader import read_offline_runs

from jepa.cli.compare import main
from jepa.comparison import plan as compare_module
from jepa.comparison.headline import headline
from jepa.comparison.plan import Recipe, plan
from jepa.comparison.report import curve, html, markdown, table, terminal
from jepa.comparison.results import RunResult, compare, find_runs, labels, spread, what_it_predicts
from jepa.comparison.runs import TrainProcesses, run_all
from jepa.config import Composer, ConfigError
from jepa.config.catalogue import conf_folder
from jepa.errors import RunError
from jepa.reports.charts import Line, downsample
from jepa.runs.metrics import read_rows

COMPOSER = Composer()
QUICK = ["experiment=quickstart", "logger=none"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class Recorded(TrainProcesses):
    """Records the runs and writes their folders without training; lr=9 fails, run number `stop_at` gets a signal."""

    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__()
        self.trained: list[list[str]] = []
        self.stop_at = stop_at

    def train(self, overrides, output=None):
        self.trained.append(list(overrides))
        if self.stop_at == len(self.trained):
            self.receive(signal.SIGTERM, None)
            return 143, []
        if "lr=9" in overrides:
            return 1, ["first line", "TrainingError: it blew up"]
        name = next(text.removeprefix("name=").strip("'") for text in reversed(overrides) if text.startswith("name="))
        folder = Path("outputs") / name
        steps = next(int(text.removeprefix("steps=")) for text in reversed(overrides) if text.startswith("steps="))
        write_run(folder, steps=steps, log_every=4, eval_every=0, pictures=False)
        (folder / "config.yaml").write_text(yaml.safe_dump(COMPOSER.check(overrides).config))
        return 0, []


def members(*overrides: str, recipe: Recipe | None = None, seconds: float | None = None):
    return plan([*overrides], recipe or Recipe(), COMPOSER, seconds)[1]


def faults(*overrides: str, **options) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        members(*overrides, **options)
    return caught.value.errors


def write_member(
    folder: Path, *, objective: str = "jepa.JEPA", seed: int = 0, knn: float = 50.0, rank: float = 10.0,
    steps: int = 4, status: str = "finished", lr: float = 0.1, rate: float = 100.0, **config,
) -> Path:  # fmt: skip
    """A run folder with evaluations at steps 0, half and the end, and 10 samples per step."""
    folder.mkdir(parents=True)
    settings = {"name": str(folder), "seed": seed, "lr": lr, "objective": {"_target_": f"jepa.objectives.{objective}"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings | config))
    (folder / "run.json").write_text(json.dumps({"run_id": "a", "status": status, "message": ""}))
    rows = [
        {"step": 0, "samples": 0, "probe/knn_top1": 20.0 + seed, "collapse/rank": 3.0, "baseline/pixels_knn_top1": 30.0}
    ]
    for step in range(1, steps + 1):
        rows.append({"step": step, "samples": 10 * step, "train/loss": 1 / step, "perf/samples_per_s": rate})
        rows[-1] |= {"perf/peak_memory_gib": 0.1 * step}
    for step in (steps // 2, steps):
        rows.append({"step": step, "probe/knn_top1": knn * step / steps, "collapse/rank": rank * step / steps})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def compared(*folders: Path):
    return compare(find_runs(folders))


# ---- which runs there are


@pytest.mark.slow
def test_folders_are_those_of_a_sweep_of_jepa_train():
    sweep = ["mask=random,block", "seed=range(0,2)"]
    program = (
        "import sys, types; agent = types.ModuleType('jepa.agent'); sys.modules['jepa.agent'] = agent\n"
        "agent.train = lambda config, folder, interrupt: print('FOLDER', folder) or 0\n"
        "from jepa.cli.train import main; main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", program, "--multirun", *QUICK, *sweep, "image_size=64", "name=same"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    hydras = [line.split()[-1] for line in output.splitlines() if line.startswith("finished")]
    assert Path(hydras[0], "output.log").read_text().endswith(f"FOLDER {hydras[0]}\n")
    assert [str(m.folder) for m in members(*QUICK, *sweep, "image_size=64", "name=same")] == hydras
    assert len(hydras) == 4


def test_each_run_is_what_jepa_train_makes_of_its_overrides():
    for member in members(*QUICK, "objective=jepa,mae", "seed=0,1", "name=x"):
        assert COMPOSER.check(member.overrides).errors == []
        assert member.config["name"] == f"x/{member.label}"


def test_a_method_of_a_recipe_has_settings_of_its_own_and_the_command_line_wins():
    recipe = Recipe("mine", ("experiment=quickstart",), {"a": ["lr=1e-2"], "b": ["objective=mae", "mask.ratio=0.75"]})
    runs = members("seed=0,1", recipe=recipe)
    assert [m.label for m in runs] == ["a,seed=0", "a,seed=1", "b,seed=0", "b,seed=1"]
    assert [m.method for m in runs] == ["a", "a", "b", "b"]
    assert [m.config["lr"] for m in runs] == [1e-2, 1e-2, 1e-3, 1e-3]
    assert runs[2].config["mask"]["ratio"] == 0.75
    assert {m.config["lr"] for m in members("seed=0,1", "lr=5", recipe=recipe)} == {5}


def test_a_method_names_its_seed_so_that_others_can_come_later():
    recipe = Recipe("mine", ("experiment=quickstart",), {"a": ["lr=1e-2"], "b": ["objective=mae"]})
    assert [m.label for m in members(recipe=recipe)] == ["a,seed=0", "b,seed=0"]
    assert [m.label for m in members("seed=3", recipe=recipe)] == ["a,seed=3", "b,seed=3"]
    assert [m.label for m in members("lr=1,2", "seed=3", recipe=recipe)][:2] == ["a,lr=1,seed=3", "a,lr=2,seed=3"]


def test_what_an_objective_has_no_use_for_is_left_out_of_its_runs():
    jepa, mae, vae = members(*QUICK, "objective=jepa,mae,vae", "mask.ratio=0.5", "objective.momentum=0.9", "name=x")
    assert (jepa.dropped, mae.dropped) == ((), ("objective.momentum=0.9",))
    assert set(vae.dropped) == {"mask.ratio=0.5", "objective.momentum=0.9"}
    assert jepa.config["objective"]["momentum"] == 0.9


def test_what_one_method_of_a_recipe_takes_is_left_out_of_the_others():
    recipe = Recipe("mine", ("experiment=quickstart",), {"a": ["objective=jepa"], "b": ["objective=mae"]})
    first, second = members("objective.momentum=0.9", recipe=recipe)
    assert (first.config["objective"]["momentum"], second.dropped) == (0.9, ("objective.momentum=0.9",))


def test_runs_that_differ_only_in_what_is_left_out_are_one_run():
    runs = members(*QUICK, "objective=mae,vae", "mask.ratio=0.5,0.75", "name=x")
    assert [m.label for m in runs] == [
        "mask.ratio=0.5,objective=mae",
        "mask.ratio=0.75,objective=mae",
        "objective=vae",
    ]


def test_faults_of_all_runs_come_at_once_and_nothing_is_started():
    messages = faults(
        *QUICK, "objective=jepa,mae", "lrr=1", "mask=blok", "objective.momentun=0.9", "encoder.num_heads=7,5"
    )
    for words in ('no key "lrr"', 'did you mean "block"', "objective.momentun=0.9", "num_heads=7", "num_heads=5"):
        assert any(words in message for message in messages), words
    assert os.listdir() == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["objective=jepa"], "only one run"),
        (["seed=0,1", "name=a,b"], "a comparison has one name"),
        (["lr=interval(1,2)"], "an interval has no list of values"),
        (["compare=shape"], 'did you mean "shapes"?'),
        (["compare=shapes", "--seconds=-1"], "--seconds -1: must be above 0"),
        (["compare=shapes", "--seconds=9", "steps=3"], "--seconds works out the steps"),
        (["nowhere"], "nowhere: there is no such folder"),
        (["."], "holds no run"),
        ([".", "lr=3"], "take no overrides"),
        ([], "only one run"),
        (["--methods", "no.yaml"], "no.yaml cannot be read"),
    ],
)
def test_a_mistake_is_reported_in_a_sentence(arguments, words, capsys):
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert words in message
    assert "Traceback" not in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("methods: {}", "needs methods"),
        ("methods: {a: lr=1}", "methods.a: takes a list"),
        ("methods: {a/b: []}", "methods.a/b: a name has letters"),
        ("methods: {a: []}\nmethds: 1", "there is no key 'methds'"),
        ("a: [", "cannot be read"),
    ],
)
def test_a_wrong_file_of_methods_is_refused(text, words, capsys):
    Path("mine.yaml").write_text(text)
    assert main(["--methods", "mine.yaml"]) == 2
    assert words in capsys.readouterr().err


OF_RECIPE = {"cifar10": ["dataset=hf", "dataset.path=somebody/something"], "two_rooms": ["dataset.path=rooms"]}
METHODS = {"jepa", "mae", "vae", "autoencoder"}


@pytest.mark.parametrize("name", sorted(path.stem for path in (conf_folder() / "compare").glob("*.yaml")))
def test_a_recipe_that_is_shipped_can_be_run(name):
    Path("rooms").mkdir()
    Path("rooms/store.json").touch()
    recipe = compare_module.find_recipe(name, COMPOSER)
    runs = members("seed=0,1", *OF_RECIPE.get(name, []), recipe=recipe)
    more = {"cifar10": {"views"}, "moving_digits": {"iris"}, "two_rooms": {"iris", "dynamics"}}
    assert {m.method for m in runs} == METHODS | more.get(name, set())


def test_recipes_are_no_group_of_a_run():
    assert "compare" not in COMPOSER.catalogue.groups


# ---- running them


def test_finished_runs_are_skipped_and_a_failed_one_does_not_stop_the_others(capsys):
    arguments = [*QUICK, "lr=1e-3,9,2e-3", "steps=8", "name=x"]
    processes = Recorded()
    folder, runs = plan(arguments, Recipe(), COMPOSER, None)
    assert list(run_all(folder, runs, None, processes)) == ["outputs/x/lr=9"]
    assert len(processes.trained) == 3
    assert "TrainingError: it blew up" in capsys.readouterr().out
    again = Recorded()
    run_all(*plan(arguments, Recipe(), COMPOSER, None), None, again)
    assert [run[-1] for run in again.trained] == ["name='x/lr=9'"]


def test_a_folder_with_a_run_of_another_configuration_is_refused_at_once():
    run_all(*plan([*QUICK, "seed=0,1", "steps=8", "name=x"], Recipe(), COMPOSER, None), None, Recorded())
    messages = faults(*QUICK, "seed=0,1", "steps=12", "name=x")
    assert messages[0].startswith("outputs/x/seed=0 holds a run of another configuration (steps: 8 -> 12)")
    assert len(messages) == 2


def test_a_signal_ends_the_comparison():
    processes = Recorded(stop_at=1)
    assert run_all(*plan([*QUICK, "seed=0,1", "steps=8", "name=x"], Recipe(), COMPOSER, None), None, processes) == {}
    assert (len(processes.trained), processes.signum) == (1, signal.SIGTERM)


def test_equal_seconds_give_every_method_the_steps_that_its_measured_rate_allows():
    arguments = [*QUICK, "objective=jepa,mae", "seed=0,1", "name=x"]
    processes = Recorded()
    run_all(*plan(arguments, Recipe(), COMPOSER, 10), 10, processes)
    budget = json.loads(Path("outputs/x/budget.json").read_text())
    for method, rate in budget["samples_per_s"].items():
        assert budget["steps"][method] == round(10 * rate / 64)
    assert set(budget["steps"]) == {"objective=jepa", "objective=mae"}
    assert len(processes.trained) == 4 + 2  # one measurement for each method
    more = Recorded()
    folder, runs = plan([*arguments[:-2], "seed=0,1,2", "name=x"], Recipe(), COMPOSER, 10)
    run_all(folder, runs, 10, more)
    assert [run[-1] for run in more.trained] == [f"steps={steps}" for steps in budget["steps"].values()]
    assert "with --seconds 10" in faults(*arguments, seconds=11)[0]


@pytest.fixture(scope="module")
def real(tmp_path_factory, tiny) -> Path:
    """A comparison of two objectives with two steps each, run by the command."""
    place = tmp_path_factory.mktemp("real")
    quiet = ["experiment=quickstart", *tiny, "logger=none", "encoder.embed_dim=32", "name=small"]
    with pytest.MonkeyPatch.context() as patch, (place / "output.txt").open("w") as printed, redirect_stdout(printed):
        patch.chdir(place)
        assert main([*quiet, "objective=jepa,mae", "--wandb"]) == 0
    return place


@pytest.mark.slow
def test_the_command_trains_all_and_leaves_a_table(real):
    output = (real / "output.txt").read_text()
    first, *lines = output.splitlines()
    assert first == "2 runs in outputs/small; all output of a run is in its output.log"
    assert [line.split()[-1] for line in lines if line.startswith("finished ")] == [
        "outputs/small/objective=jepa",
        "outputs/small/objective=mae",
    ]
    assert "JEPA with" in (real / "outputs/small/objective=jepa/output.log").read_text()
    assert "Equal budget: each run has seen 8 samples." in output
    for name in (
        "compare.md",
        "compare.html",
        "compare.json",
        "objective=jepa/report.html",
        "objective=mae/report.html",
    ):
        assert (real / "outputs/small" / name).stat().st_size > 0
    for folder in ("objective=jepa", "objective=mae"):
        memory = [row["perf/peak_memory_gib"] for row in read_rows(real / "outputs/small" / folder) if row["step"]]
        assert len(memory) == 2
        assert 0.05 < memory[0] <= memory[1] < 50


@pytest.mark.slow
def test_the_table_is_sent_to_wandb(real):
    [run] = read_offline_runs(real / "outputs/small")
    assert run.rows[2]["jepa/probe_knn_top1"] == run.summary["jepa/probe_knn_top1"]
    sent = json.loads(run.artifact_files["comparison.table.json"].read_text())
    assert sent["columns"][:3] == ["method", "predicts", "kNN"]
    assert {row[0] for row in sent["data"]} == {"jepa", "mae", "untrained encoder", "raw pixels"}


@pytest.mark.slow
def test_a_comparison_that_a_signal_stops_lets_the_run_save_and_starts_no_other(tiny, tmp_path):
    quiet = [
        "experiment=quickstart",
        *tiny,
        "steps=2000",
        "save_every=2000",
        "eval_every=2000",
        "logger=none",
        "name=long",
    ]
    command = [sys.executable, "-m", "jepa.cli.compare", *quiet, "seed=0,1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, stderr=subprocess.STDOUT)
    metrics = tmp_path / "outputs/long/seed=0/metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and '"step": 5,' in metrics.read_text()):
        time.sleep(0.2)
    process.send_signal(signal.SIGQUIT)
    output = process.communicate()[0]
    assert process.returncode == 128 + signal.SIGQUIT, output
    assert "Traceback" not in output
    state = json.loads((tmp_path / "outputs/long/seed=0/run.json").read_text())
    assert (state["status"], (tmp_path / "outputs/long/seed=0/checkpoints/last").exists()) == ("stopped", True)
    assert not (tmp_path / "outputs/long/seed=1").exists()


# ---- what is made of the numbers


def test_mean_and_sample_deviation_over_seeds(tmp_path):
    for seed, knn in enumerate((50.0, 53.0, 59.0)):
        write_member(tmp_path / f"a{seed}", seed=seed, knn=knn)
    comparison = compared(tmp_path)
    [method] = comparison.methods
    assert comparison.values(method)[0] == (54.0, statistics.stdev((50, 53, 59)), 3)
    assert comparison.baselines[0][1][0] == (21.0, 1.0, 3)
    assert comparison.baselines[1][1][0] == (30.0, 0.0, 3)
    assert spread([4.0, None, float("nan")]) == (4.0, None, 1)
    assert spread([None]) is None


def test_one_seed_has_no_spread_and_says_so(tmp_path):
    comparison = compared(write_member(tmp_path / "a"))
    assert table(comparison).rows[0][1] == "50.0 %"
    assert any("fewer than 3 seeds has no ±" in note for note in comparison.notes)
    assert spread([50.0, 52.0]) == (51.0, None, 2)


def write_methods(folder: Path, methods: dict[str, tuple[float, ...]], **values) -> Path:
    for method, by_seed in methods.items():
        for seed, knn in enumerate(by_seed):
            write_member(folder / f"{method}{seed}", objective=method, seed=seed, knn=knn, **values)
    return folder


@pytest.mark.parametrize(
    ("methods", "words", "is_clear"),
    [
        ({"mae.MAE": (70, 71, 72), "jepa.JEPA": (60, 61, 62)}, ["mae is ahead by 10.0 points", "3 seeds each"], True),
        ({"mae.MAE": (70, 71, 72), "jepa.JEPA": (69, 71, 72)}, ["unclear: kNN of mae 71.0", "may be chance"], False),
        ({"mae.MAE": (70, 71), "jepa.JEPA": (40, 41)}, ["unclear", "2 seeds each: too few", "give seed=0,1,2"], False),
        ({"mae.MAE": (70,), "jepa.JEPA": (40, 41, 42)}, ["unclear", "from 1 and 3 seeds: too few"], False),
        ({"mae.MAE": (25, 25, 25), "jepa.JEPA": (5, 5, 5)}, ["mae is ahead", "no better than raw pixels 30.0"], False),
        ({"mae.MAE": (50,)}, ["one method: kNN of mae 50.0 %, from 1 seed"], False),
    ],
)
def test_what_is_ahead_and_by_how_much_comes_first(tmp_path, methods, words, is_clear):
    comparison = compared(write_methods(tmp_path, methods))
    first, page = terminal(comparison).splitlines()[0], html(comparison, tmp_path, "x")
    assert all(text in first for text in words), first
    assert headline(comparison).is_clear == is_clear
    assert page.index(headline(comparison).reason) < page.index("<table")
    assert headline(comparison).reason in markdown(comparison, "x").splitlines()[2].replace("&lt;", "<")
    assert "(n=2)" not in page


def test_a_difference_that_so_few_evaluated_samples_cannot_show_is_unclear(tmp_path):
    write_methods(tmp_path, {"mae.MAE": (70, 71, 72), "jepa.JEPA": (60, 61, 62)})
    for path in tmp_path.glob("*/metrics.jsonl"):
        path.write_text(path.read_text() + json.dumps({"step": 4, "perf/evaluation_samples": 100}) + "\n")
    assert headline(compared(tmp_path)).word == "unclear"
    assert not table(compared(tmp_path)).best


def test_what_methods_predict_is_shown_where_it_differs(tmp_path):
    for lr in (0.1, 0.2):
        write_member(tmp_path / f"{lr}", lr=lr)
    assert "predicts" not in table(compared(tmp_path)).heads
    assert "latents" not in terminal(compared(tmp_path))
    write_member(tmp_path / "mae", objective="mae.MAE")
    assert table(compared(tmp_path)).heads[1] == "predicts"


def test_only_what_is_ahead_by_more_than_both_spreads_is_marked(tmp_path):
    write_methods(tmp_path, {"mae.MAE": (70, 71, 72), "jepa.JEPA": (60, 61, 62), "vae.VAE": (59, 60, 62)})
    result = table(compared(tmp_path))
    assert [row[0] for row in result.rows[:3]] == ["mae", "jepa", "vae"]
    assert result.best == {(0, result.heads.index("kNN"))}
    assert result.rows[0][1] == "predicts the pixels of hidden patches from the visible ones"
    write_member(tmp_path / "close", objective="mae.MAE", seed=3, knn=50)
    assert not table(compared(tmp_path)).best


def test_the_last_step_counts_and_not_the_best(tmp_path):
    folder = write_member(tmp_path / "a", knn=50)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 3, "probe/knn_top1": 99.0}) + "\n")
    assert table(compared(folder)).rows[0][1] == "50.0 %"


def test_training_time_is_the_sum_over_rates_so_that_pauses_do_not_count():
    rows = [{"step": s, "samples": 10 * s, "perf/samples_per_s": r} for s, r in ((1, 10), (3, 5), (4, 20))]
    run = RunResult(folder=Path(), config={}, rows=rows, status="finished", message="")
    assert run.clock == [(0, 0, 0), (1, 10, 1), (3, 30, 5), (4, 40, 5.5)]
    assert run.at(2) == (20, 3)


def test_a_run_without_regularizers_is_labelled_none():
    for sections, label in (({"vicreg": {"weight": 1.0}}, "vicreg"), ({}, "none")):
        run = RunResult(folder=Path(), config={"regularizer": sections}, rows=[], status="finished", message="")
        assert run.settings["regularizer"] == label


def test_runs_that_are_not_finished_are_listed_and_left_out(tmp_path):
    write_member(tmp_path / "a")
    write_member(tmp_path / "b", seed=1, knn=90, status="failed")
    comparison = compared(tmp_path)
    assert [run.config["seed"] for method in comparison.methods for run in method.runs] == [0]
    assert comparison.left_out == [(str(tmp_path / "b"), "failed")]
    assert "Left out" in html(comparison, tmp_path, "x")
    with pytest.raises(RunError, match="none of the runs is finished"):
        compared(tmp_path / "b")


def test_different_numbers_of_samples_are_reported(tmp_path):
    write_member(tmp_path / "a")
    write_member(tmp_path / "b", objective="mae.MAE", steps=8)
    assert compared(tmp_path).budget.startswith("NOT an equal budget")
    assert compared(tmp_path / "a").budget == "Equal budget: each run has seen 40 samples."


def test_methods_are_named_by_what_tells_them_apart():
    jepa, mae = ({"objective._target_": f"jepa.objectives.{name}", "lr": 1} for name in ("jepa.JEPA", "mae.MAE"))
    assert labels([jepa | {"objective.momentum": 0.9}, mae]) == ["jepa", "mae"]
    assert labels([jepa, jepa | {"lr": 2}]) == ["lr=1", "lr=2"]
    assert labels([jepa, jepa | {"lr": 2}, mae]) == ["jepa, lr=1", "jepa, lr=2", "mae"]
    assert labels([jepa, jepa | {"regularizer": "vicreg"}])[1] == "regularizer=vicreg"
    assert labels([jepa]) == ["jepa"]


def test_a_sweep_is_sorted_by_its_first_probe_and_shows_which_criterion_would_have_chosen(tmp_path):
    for place, (knn, rank) in enumerate([(40, 4), (70, 7), (60, 6), (50, 5)]):
        write_member(tmp_path / f"{place}", lr=place + 1.0, knn=knn, rank=rank)
    comparison = compared(tmp_path)
    assert [method.label for method in comparison.methods] == ["lr=2.0", "lr=3.0", "lr=4.0", "lr=1.0"]
    by_name = {c.criterion: c for c in comparison.correlations}
    assert by_name["rank"].over_runs == (pytest.approx(1.0), 4)
    assert by_name["rank"].over_evaluations[1] == 8
    assert np.isnan(by_name["minus training loss"].over_runs[0])  # the same for all


def test_there_are_no_correlations_of_fewer_than_four_runs(tmp_path):
    for place in range(3):
        write_member(tmp_path / f"{place}", lr=place + 1.0, knn=place + 40)
    assert "Selection without labels" not in html(compared(tmp_path), tmp_path, "x")
    write_member(tmp_path / "3", lr=4.0, knn=45)
    assert "Selection without labels" in html(compared(tmp_path), tmp_path, "x")


def test_a_curve_is_the_mean_over_seeds_in_a_band_of_them(tmp_path):
    for seed, (knn, rate) in enumerate([(40, 10.0), (60, 20.0)]):
        write_member(tmp_path / f"{seed}", seed=seed, knn=knn, rate=rate)
    [method] = compared(tmp_path).methods
    assert curve(method, "probe/knn_top1", "step") == Line(
        name="jepa", points=[(0, 20.5), (2, 25), (4, 50)], band=[(20, 21), (20, 30), (40, 60)]
    )
    assert [x for x, _ in curve(method, "probe/knn_top1", "sample").points] == [0, 20, 40]
    assert [x for x, _ in curve(method, "probe/knn_top1", "second").points] == [0, 1.5, 3]
    assert [(b.low, b.high) for b in downsample([(0, 1.0), (1, 2.0)], band=[(0, 3), (1, 2)])] == [(0, 3), (1, 2)]


def test_the_page_needs_nothing_else_and_links_to_the_runs(tmp_path):
    write_member(tmp_path / "a&b")
    page = html(compared(tmp_path), tmp_path, "x<y")
    assert 'href="a&amp;b/report.html"' in page
    assert "x&lt;y" in page
    assert "<script" not in page
    assert "http" not in page.replace("http://www.w3.org", "")


def test_no_name_note_or_reason_becomes_markup(tmp_path):
    for place in range(4):
        write_member(tmp_path / f"{place}&<b>", lr=place + 1.0, knn=place + 40)
    comparison = compared(tmp_path)
    hostile = dataclasses.replace(
        comparison,
        columns=[column._replace(head=HOSTILE) for column in comparison.columns],
        methods=[
            dataclasses.replace(method, label=HOSTILE, predicts=f"{HOSTILE}{number}")
            for number, method in enumerate(comparison.methods)
        ],
        baselines=[(HOSTILE, values) for _, values in comparison.baselines],
        left_out=[(HOSTILE, HOSTILE)],
        budget=HOSTILE,
        notes=[HOSTILE],
        correlations=[c._replace(criterion=HOSTILE, probe=HOSTILE) for c in comparison.correlations[:1]],
    )
    num_columns, num_methods = len(comparison.columns), len(comparison.methods)
    page = html(hostile, tmp_path, HOSTILE)
    # title, heading, budget, note, left-out run and reason; heads; methods with predictions; runs; a chart an axis
    assert count_as_text(page) >= 6 + num_columns + 3 * num_methods + 3
    tables = [line for line in markdown(hostile, HOSTILE).splitlines() if line.startswith("|")]
    bars = [line.replace("\\|", "").count("|") for line in tables]
    assert set(bars[: 2 + num_methods]) == {1 + len(table(hostile).heads)}
    assert not any("<" in line for line in tables)
    assert terminal(hostile).splitlines()[2].startswith(HOSTILE)


def test_a_jepa_that_hides_nothing_is_said_to_compare_crops():
    comments = {"jepa.objectives.jepa.JEPA": "predicts latents"}
    settings = {"objective._target_": "jepa.objectives.jepa.JEPA", "mask._target_": "jepa.masks.none.NoMask"}
    assert what_it_predicts(settings, comments) == "makes crops of an image alike, and hides no tokens"
    hiding = settings | {"mask._target_": "jepa.masks.random.RandomMasker"}
    assert what_it_predicts(hiding, comments) == "predicts latents"
