"""jepa-plan: one tiny world from its episodes to the page, what is refused, and what a killed command leaves."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
from tiny_world import TINY, train_world

from jepa.cli import train
from jepa.cli.plan import main
from jepa.config import ConfigError, compose_plan
from jepa.objectives.dynamics import Dynamics
from jepa.planning import fit
from jepa.planning import run as planning
from jepa.planning.worlds import with_planner
from jepa.reports.console import next_commands
from jepa.reports.statistics import wilson
from jepa.runs.metrics import read_config

PLAN = [
    *("episodes=4", "budget=8", "videos=2", "planner.samples=8", "planner.elites=4", "planner.iterations=2"),
    *("planner.horizon=4", "planner.execute=2"),
]
FIELDS = {
    *("policy", "cost", "seed", "episodes", "success_moderate", "success_strict", "interval_moderate"),
    *("interval_strict", "seconds_per_episode", "ms_per_step", "predictor_rows", "outcomes"),
}
FLOORS = ["random", "straight_line", "expert", "true_dynamics_euclid", "true_dynamics_path"]
TIMES = ("seconds_per_episode", "ms_per_step")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two worlds, outputs/a and outputs/b, and the plans of the first in outputs/plans."""
    folder = tmp_path_factory.mktemp("plan")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train_world("a")
        train_world("b", ["seed=1"])
        assert main(["run=outputs/a", "name=plans", *PLAN]) == 0
    return folder


@pytest.fixture
def here(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(home)
    return home


def results(name: str) -> dict[str, Any]:
    return json.loads(Path("outputs", name, "results.json").read_text())


def without_times(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def test_results_have_the_fields_of_the_contract(here: Path) -> None:
    found = results("plans")
    assert found["schema"] == 1
    assert re.fullmatch("sha256:[0-9a-f]{64}", found["tasks"])
    assert found["world"]["a"]["frame_shape"] == [1, 64, 64]
    assert [row["policy"] for row in found["rows"]] == [*FLOORS, "clone", "policy", "cem"]
    for row in found["rows"]:
        assert row.keys() >= FIELDS
        assert row["episodes"] == len(row["outcomes"]) == 4
        for name in ("moderate", "strict"):
            wins = sum(outcome[name] for outcome in row["outcomes"])
            assert row[f"success_{name}"] == wins / 4
            assert row[f"interval_{name}"] == list(wilson(wins / 4, 4))
    planned = found["rows"][-1]
    assert (planned["policy"], planned["cost"], planned["seed"]) == ("cem", "gc_value", 0)
    assert planned["predictor_rows"] > 0
    assert found["rows"][0]["predictor_rows"] == 0


def test_all_rows_are_on_the_frozen_tasks(here: Path) -> None:
    tasks = json.loads(Path("outputs/plans/tasks.json").read_text())
    for row in results("plans")["rows"]:
        assert [{key: outcome[key] for key in ("start", "goal")} for outcome in row["outcomes"]] == tasks["tasks"]


class Parts(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.count: dict[str, int] = {}
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        if tag not in ("meta", "br", "img", "link", "hr", "input", "path", "line", "circle", "rect", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data.strip())


def test_the_page_has_the_table_and_a_strip_of_every_row(here: Path) -> None:
    page = Parts()
    page.feed(Path("outputs/plans/plan.html").read_text())
    page.close()
    assert page.open == []
    assert page.count["table"] >= 2
    assert page.count["img"] >= 8 + 1  # strips, and the landscape of the cost
    assert {*FLOORS, "clone", "policy", "cem"} <= set(page.text)
    assert len(list(Path("outputs/plans/media").glob("strip-*.png"))) == 8
    assert "true_dynamics_path" in Path("outputs/plans/plan.md").read_text()


def test_the_video_shows_agent_and_goal(here: Path) -> None:
    av = pytest.importorskip("av")
    (path,) = Path("outputs/plans/media").glob("*.mp4")
    with av.open(str(path)) as video:
        stream = video.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(stream)]
        assert stream.codec_context.name == "h264"
    assert len(frames) >= 9
    assert frames[0].shape[1] >= 2 * 192 - 2
    assert frames[0].max() > 200


def test_the_commands_that_the_world_printed_when_it_was_trained_run(here: Path) -> None:
    first, other, _ = [
        shlex.split(command) for command, _ in next_commands(read_config(Path("outputs/a")), Path("outputs/a"))
    ]
    assert main([*first[1:], "name=first", "baselines=[]", *PLAN]) == 0
    assert main([*other[1:], "baselines=[]", *PLAN]) == 0
    assert [row["policy"] for name in ("first", "a-icem") for row in results(name)["rows"]] == ["cem", "icem"]


def test_the_same_command_runs_nothing_again(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = results("plans")

    def refuse(*arguments: Any) -> None:
        raise AssertionError("a row was run again")

    monkeypatch.setattr(planning, "run_one", refuse)
    assert main(["run=outputs/a", "name=plans", *PLAN]) == 0
    assert results("plans") == before


def test_several_worlds_stand_in_one_table_with_their_mean(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run=[outputs/a,outputs/b]", "name=both", "baselines=[random,clone]", *PLAN]) == 0
    rows = results("both")["rows"]
    assert [(row["policy"], row["world"], row["seed"]) for row in rows] == [
        ("random", "", 0),
        ("clone", "a", 0),
        ("cem", "a", 0),
        ("clone", "b", 1),
        ("cem", "b", 1),
        ("clone", "", None),
        ("cem", "", None),
    ]
    mean = rows[-1]
    assert mean["episodes"] == 8
    assert mean["success_strict"] == (rows[2]["success_strict"] + rows[4]["success_strict"]) / 2
    assert results("both")["tasks"] == results("plans")["tasks"]
    assert set(results("both")["world"]) == {"a", "b"}
    text, errors = capsys.readouterr()
    assert "report  outputs/both/plan.html, written at the end" in errors
    first = text.splitlines()[:4]
    assert [line.split()[0] for line in first] == ["cost", "random", "clone", "cem"], first
    assert all(word in text for word in ("clone", "mean", "plan.html"))
    before = results("both")
    assert main(["run=[outputs/a,outputs/b]", "name=both", "baselines=[random,clone]", *PLAN]) == 0
    assert results("both") == before


def test_rows_of_other_settings_are_no_seeds_of_a_mean(here: Path) -> None:
    short = ["run=outputs/a", "name=settings", "baselines=[]", *PLAN]
    assert main(short) == 0
    assert main([*short, "planner.iterations=1"]) == 0
    assert [row["seed"] for row in results("settings")["rows"]] == [0, 0]


def test_a_policy_is_a_planner(here: Path) -> None:
    arguments = ["run=outputs/a", "name=policy", "planner=policy", "baselines=[random]", "episodes=4", "budget=8"]
    assert main(arguments) == 0
    assert [row["policy"] for row in results("policy")["rows"]] == ["random", "policy"]


@pytest.mark.parametrize("planner", ["icem", "mppi", "gradient", "random_shooting"])
def test_every_planner_plans_with_a_world(planner: str, here: Path) -> None:
    cost = "[latent_l2,probe_distance,control]"
    small = ["planner.horizon=3", "planner.execute=3", "episodes=2", "budget=3", "videos=0", "baselines=[]"]
    assert main(["run=outputs/a", f"name={planner}", f"planner={planner}", f"cost={cost}", *small]) == 0
    (row,) = results(planner)["rows"]
    assert (row["policy"], row["cost"]) == (planner, "latent_l2+probe_distance+control")


def test_a_world_with_a_metric_and_no_value_is_planned_with_a_tree(here: Path, changed: None) -> None:
    small = ["episodes=3", "budget=8", "planner.horizon=8", "videos=2", "baselines=[]", "name=trees"]
    assert main(["run=outputs/trees", *small]) == 0
    (row,) = results("trees")["rows"]
    assert (row["policy"], row["cost"]) == ("tree", "metric_distance")
    assert row["predictor_rows"] > 8
    assert "cost_correlation" in results("trees")["plannable"]["trees"]


def test_other_tasks_in_the_same_folder_are_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run=outputs/a", "name=plans", *PLAN, "seed=3"]) == 2
    assert "seed=0, now 3; give another name=" in capsys.readouterr().err
    shutil.copytree("outputs/plans", "outputs/changed")
    path = Path("outputs/changed/tasks.json")
    tasks = json.loads(path.read_text())
    tasks["tasks"][0]["start"][1] += 1
    path.write_text(json.dumps(tasks))
    assert main(["run=outputs/a", "name=changed", *PLAN]) == 2
    assert "results on other tasks" in capsys.readouterr().err


REFUSED = [
    ([], "run and experiment: give one of them"),
    (["run=outputs/a", "experiment=two_rooms"], "run and experiment: give one of them"),
    (["run=outputs/nothing"], "outputs/nothing holds no checkpoint"),
    (["run=outputs/no_world"], "holds no world model; train one with objective=dynamics"),
    (["experiment=two_room"], 'did you mean "two_rooms"?'),
    (["run=outputs/a", "planner=cme"], 'did you mean "cem"?'),
    (["run=outputs/a", "cost=gc_valeu"], 'did you mean "gc_value"?'),
    (["run=outputs/a", "baselines=[randm]"], '"random"'),
    (
        ["run=outputs/a", "planner=categorical_cem"],
        "continuous actions, which CategoricalCEM does not plan; use planner=cem",
    ),
    (
        ["run=outputs/discrete", "planner=icem"],
        "discrete actions, which ICEM does not plan; use planner=categorical_cem",
    ),
    (["experiment=two_rooms", "planner=categorical_cem"], "two_rooms has continuous actions"),
    (["experiment=two_rooms", "compare=encoder"], 'did you mean "encoders"?; valid: encoders'),
    (
        ["experiment=two_rooms", "compare=encoders", "encoders=[jepa,maee]"],
        "no such encoder 'maee'; did you mean \"mae\"?",
    ),
    (["experiment=two_rooms", "compare=encoders", "encoders=[outputs/nothing]"], "nothing does not exist"),
    (["experiment=two_rooms", "encoders=[jepa]"], "needs compare=encoders"),
    (["run=outputs/a", "compare=encoders"], "give experiment= instead of run="),
    (["run=outputs/a", "budget=10"], "a plan is longer than an episode"),
    (["run=outputs/a", "planner.execute=20"], "more steps are executed than planned"),
    (["run=outputs/a", "planner.samples=0"], "at least 1"),
    (["run=outputs/a", "episodes=0"], "at least 1"),
    (["run=outputs/a", "planner.sampels=3"], 'did you mean "planner.samples"?'),
    (["run=outputs/a", "name=../x"], "below outputs/"),
]


def change_world(folder: Path, change: Any) -> None:
    from jepa.runs.checkpoint import with_checksum

    for path in folder.glob("checkpoints/step_*/state.json"):
        state = json.loads(path.read_text())
        change(state)
        path.write_text(json.dumps(with_checksum(state)))


@pytest.fixture(scope="module")
def changed(home: Path) -> None:
    """outputs/no_world and outputs/discrete, copies of outputs/a whose state.json says so, and outputs/trees."""
    for name in ("no_world", "discrete"):
        shutil.copytree(home / "outputs/a", home / "outputs" / name, symlinks=True)
    change_world(home / "outputs/no_world", lambda state: state.pop("world"))
    discrete = {"low": [], "high": [], "num_actions": 3}
    change_world(home / "outputs/discrete", lambda state: state["world"].update(discrete))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        train_world("trees", ["objective.heads=[metric,probe]"])


@pytest.mark.parametrize(
    ("overrides", "expected"), REFUSED, ids=lambda value: "-".join(value)[:40] if isinstance(value, list) else ""
)
def test_mistakes_are_refused_in_one_line(
    overrides: list[str], expected: str, here: Path, changed: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*overrides, *([] if any("name=" in o for o in overrides) else ["name=refused"])]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert expected in " ".join(lines)
    assert sum("error" not in line for line in lines) <= 1
    assert not Path("outputs/refused").exists()


@pytest.mark.parametrize(
    ("overrides", "added"),
    [
        (["run=outputs/discrete"], ["planner=categorical_cem"]),
        (["run=[outputs/discrete,outputs/a]"], ["planner=categorical_cem"]),
        (["run=outputs/a"], []),
        (["experiment=two_rooms"], []),
        (["experiment=two_rooms", "train=['objective.heads=[metric,probe]']"], ["planner=tree"]),
        (["experiment=two_rooms", "train=['objective.heads=[metric,value]']"], []),
        (["run=outputs/trees"], ["planner=tree"]),
        (["run=outputs/trees", "planner=cem"], []),
        (["run=outputs/discrete", "planner=policy"], []),
        (["run=outputs/nothing"], []),
    ],
)
def test_the_planner_follows_the_actions_if_none_is_named(
    overrides: list[str], added: list[str], here: Path, changed: None
) -> None:
    assert with_planner(overrides, None)[0] == [*overrides, *added]


def test_predictions_are_measured_on_the_episodes_of_the_training_alone(
    copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, store = Path("outputs/a"), Path("outputs/episodes")
    data = planning.data_of(run)
    assert data is not None
    assert list(data.held_out_numbers) == [36, 37, 38, 39]
    assert not caplog.records
    frames = np.load(store / "group-000000/frames.npy")
    np.save(store / "group-000000/frames.npy", frames[::-1])
    assert planning.data_of(run) is None
    assert "have changed (as many samples, but other contents" in caplog.text
    shutil.rmtree(store)
    assert planning.data_of(run) is None
    assert "are not there any more" in caplog.text


def test_all_errors_come_at_once(here: Path) -> None:
    with pytest.raises(ConfigError) as refusal:
        compose_plan(["run=outputs/nothing", "budget=3", "baselines=[x]"])
    assert len(refusal.value.errors) == 3


def test_an_environment_of_another_contract_is_refused_with_both_values(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run=outputs/a", "env=two_rooms", "env.channels=3", "name=refused", *PLAN]) == 2
    text = capsys.readouterr().err
    assert "frame_shape" in text
    assert "(1, 64, 64)" in text
    assert "(3, 64, 64)" in text


def test_a_cost_without_its_head_is_refused_by_name(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run=outputs/a", "cost=temporal_distance", "name=refused", *PLAN]) == 2
    assert "no head distance; add it to objective.heads" in capsys.readouterr().err


def test_help_lists_planners_and_costs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("icem", "categorical_cem", "gc_value", "latent_l2", "run=RUN"))


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [case[0] for case in REFUSED[:1]])
def test_torch_is_not_imported_for_a_refusal(arguments: list[str], here: Path, changed: None) -> None:
    program = f"import sys; from jepa.cli.plan import main; main({arguments}); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def run_killed(module: Any, function: str, count: int, main: Callable[[list[str]], int], arguments: list[str]) -> None:
    """Run the command in a process that is killed when the function of the module has ended for the count-th time."""

    def run() -> int:
        setattr(module, function, kill_after(getattr(module, function), count))
        return main(arguments)

    assert forked.status(run, Path.cwd(), Path("output")) == -signal.SIGKILL, Path("output").read_text()


def kill_after(function: Callable[..., Any], count: int) -> Callable[..., Any]:
    calls: list[None] = []

    def wrapped(*arguments: Any, **keywords: Any) -> Any:
        value = function(*arguments, **keywords)
        calls.append(None)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return value

    return wrapped


@pytest.fixture
def copy(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the episodes and the first world."""
    for name in ("a", "episodes"):
        shutil.copytree(home / "outputs" / name, tmp_path / "outputs" / name, symlinks=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tensors_of(path: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(path)


def assert_same_tensors(one: Path, other: Path) -> None:
    first, second = tensors_of(one), tensors_of(other)
    assert first.keys() == second.keys()
    assert all((first[name] == second[name]).all() for name in first)


@pytest.mark.slow
@pytest.mark.parametrize(("function", "count"), [("save_heads", 1), ("save_file", 3)])
def test_heads_are_the_same_after_a_kill_while_they_were_fitted(
    function: str, count: int, home: Path, copy: Path
) -> None:
    for path in copy.glob("outputs/a/heads.*"):
        path.unlink()
    run_killed(fit, function, count, train.main, [*TINY, "name=a"])
    assert train.main([*TINY, "name=a"]) == 0
    assert_same_tensors(copy / "outputs/a/heads.safetensors", home / "outputs/a/heads.safetensors")
    assert (copy / "outputs/a/heads.json").read_bytes() == (home / "outputs/a/heads.json").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("count", [4])
def test_the_table_is_the_same_after_a_kill_while_planning(count: int, home: Path, copy: Path) -> None:
    arguments = ["run=outputs/a", "name=plans", *PLAN]
    run_killed(planning, "write_json", count, main, arguments)
    assert len(results("plans")["rows"]) == count
    assert main(arguments) == 0
    expected = json.loads((home / "outputs/plans/results.json").read_text())
    assert without_times(results("plans")["rows"]) == without_times(expected["rows"])
    assert results("plans")["plannable"] == expected["plannable"]
    assert {path.name for path in copy.glob("outputs/plans/media/*")} == {
        path.name for path in home.glob("outputs/plans/media/*")
    }


@pytest.mark.slow
def test_a_training_that_was_killed_ends_with_the_same_world(home: Path, copy: Path) -> None:
    shutil.rmtree(copy / "outputs/a")
    run_killed(Dynamics, "after_step", 14, train.main, [*TINY, "name=a"])
    assert train.main([*TINY, "name=a"]) == 0
    for path in home.glob("outputs/a/checkpoints/step_00000020/*model*.safetensors"):
        assert_same_tensors(copy / path.relative_to(home), path)
    assert_same_tensors(copy / "outputs/a/heads.safetensors", home / "outputs/a/heads.safetensors")


@pytest.mark.slow
def test_an_experiment_is_collected_trained_for_every_seed_and_planned_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    changes = ",".join(f"'{change}'" for change in TINY if not change.startswith("experiment="))
    arguments = ["experiment=two_rooms", f"train=[{changes}]", "seeds=2", "name=e"]
    assert main([*arguments, *PLAN, "baselines=[random]"]) == 0
    rows = results("e")["rows"]
    assert [(row["policy"], row["world"], row["seed"]) for row in rows] == [
        ("random", "", 0),
        ("cem", "two_rooms", 0),
        ("cem", "two_rooms-seed1", 1),
        ("cem", "", None),
    ]
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("outputs/two_rooms*/checkpoints/*/state.json")}
    assert main([*arguments, *PLAN, "baselines=[random]"]) == 0
    assert written == {path: path.stat().st_mtime_ns for path in written}
    assert results("e")["rows"] == rows


def test_an_open_loop_saves_its_plans_and_executes_one(here: Path) -> None:
    assert main(["run=outputs/a", "name=open", "open_loop=true", "baselines=[random]", *PLAN]) == 0
    (plans,) = json.loads(Path("outputs/open/plans.json").read_text()).values()
    assert [len(plan) for plan in plans] == [4] * 4  # the horizon, for each task
    (row,) = [row for row in results("open")["rows"] if row["policy"] == "cem"]
    assert max(outcome["steps"] for outcome in row["outcomes"]) <= 4


def test_a_plan_may_begin_with_the_policy(here: Path) -> None:
    assert main(["run=outputs/a", "name=warm", "planner.warm_start=policy", "baselines=[random]", *PLAN]) == 0
    assert [row["policy"] for row in results("warm")["rows"]] == ["random", "cem"]


def test_a_world_that_has_changed_is_planned_with_anew(home: Path, copy: Path) -> None:
    shutil.copytree(home / "outputs/plans", "outputs/plans")
    before = results("plans")["rows"]
    shutil.rmtree("outputs/a")
    shutil.copytree(home / "outputs/b", "outputs/a", symlinks=True)
    assert main(["run=outputs/a", "name=plans", *PLAN]) == 0
    after = results("plans")["rows"]
    assert [row["policy"] for row in after if row["world"]] == ["clone", "policy", "cem"]
    assert {row["key"] for row in after if row["world"]}.isdisjoint(row["key"] for row in before)


def test_a_world_with_a_history_is_planned_with(here: Path) -> None:
    train_world("moving", ["predictor.history=2", "steps=2", "objective.head_steps=2"])
    choices = ["cost=[gc_value,probe_distance]", "planner.warm_start=policy", "baselines=[clone,policy]"]
    assert main(["run=outputs/moving", "name=moving_plan", *choices, *PLAN]) == 0
    assert [row["policy"] for row in results("moving_plan")["rows"] if row["world"]] == ["clone", "policy", "cem"]
    assert "state_r2" in results("moving_plan")["plannable"]["moving"]
