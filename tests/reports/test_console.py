"""The console: a header, a row for each evaluation with what is normal now, and commands that fit the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from jepa.reports.console import closing_lines, evaluation_rows, next_commands, opening_lines
from jepa.reports.run_table import table_rows

RUN = Path("outputs/cats")
SPREAD = {"collapse/std": 0.4, "collapse/cosine": 0.7, "collapse/rank": 9.0, "collapse/rank_centred": 30.0}
START = {"step": 0, "probe/knn_top1": 20.0, "probe/linear_top1": 30.0, "baseline/pixels_linear_top1": 40.0, **SPREAD}


def config(objective: str = "jepa.objectives.jepa.JEPA", **dataset: Any) -> dict[str, Any]:
    encoder = {"_target_": "jepa.encoders.spatial.SpatialEncoder"}
    return {"objective": {"_target_": objective}, "encoder": encoder, "dataset": dataset, "num_frames": 1}


FOLDER = {"_target_": "jepa.data.folders.ImageFolder", "root_path": "/data/my cats", "image_folder": "train"}
SHAPES = {"_target_": "jepa.data.embedded.Shapes"}


def test_the_first_lines_say_what_is_trained_where_it_is_seen_and_how_it_is_stopped() -> None:
    text = "".join(opening_lines(config(**SHAPES), RUN))
    assert "outputs/cats: JEPA with SpatialEncoder on Shapes" in text
    assert "outputs/cats/report.html" in text
    assert "the same command goes on" in text


@pytest.mark.parametrize(("lr", "count"), [(0.1, 0), (0.2, 3)])
def test_a_finished_run_has_no_header_unless_its_keys_have_changed(lr: float, count: int, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"run_id": "a", "status": "finished", "message": ""}')
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config(**SHAPES) | {"lr": 0.1}))
    assert len(opening_lines(config(**SHAPES) | {"lr": lr}, tmp_path)) == count


def test_the_first_evaluation_has_a_head_and_the_floors() -> None:
    head, start, pixels = evaluation_rows([START], 0, 100, "untrained", with_head=True)
    assert head.split()[:4] == ["step", "kNN", "linear", "rank"]
    assert start.split()[:6] == ["0", "20.0", "%", "30.0", "%", "9.0"]
    assert "untrained encoder" in start
    assert pixels.split()[:4] == ["-", "-", "40.0", "%"]
    assert "raw pixels" in pixels


def row_at(step: int, linear: float, losses: list[float]) -> str:
    rows: list[dict[str, float]] = [START]
    rows += [{"step": n + 1, "train/loss": loss, "train/momentum": 0.99} for n, loss in enumerate(losses)]
    rows.append({"step": step, "probe/knn_top1": 21.0, "probe/linear_top1": linear, **SPREAD})
    lines = evaluation_rows(rows, step, 100, "untrained", with_head=False)
    assert len(lines) == 1
    return lines[0]


def test_later_rows_have_the_verdict_so_far_and_what_is_normal_now() -> None:
    assert row_at(50, 60.0, [0.9, 0.5, 0.4, 0.3]).endswith("  learning")
    assert "learning: the loss rises while the targets grow richer, which is normal" in row_at(
        50, 60.0, [0.9, 0.1, 0.2, 0.4]
    )
    assert "stalled: early: probes often dip" in row_at(20, 30.0, [0.9, 0.5, 0.4, 0.3])
    assert "early" not in row_at(50, 30.0, [0.9, 0.5, 0.4, 0.3])


@pytest.mark.parametrize(
    ("objective", "dataset", "commands"),
    [
        ("jepa.objectives.jepa.JEPA", SHAPES, ["jepa-eval", "jepa-train", "jepa-embed"]),
        ("jepa.objectives.jepa.JEPA", FOLDER, ["jepa-eval", "jepa-finetune", "jepa-embed"]),
        ("jepa.objectives.classify.Classification", FOLDER, ["jepa-predict", "jepa-embed", "jepa-export"]),
        ("jepa.objectives.detect.Detector", FOLDER, ["jepa-predict", "jepa-embed", "jepa-export"]),
    ],
)
def test_three_next_commands_fit_the_run(objective: str, dataset: dict[str, Any], commands: list[str]) -> None:
    found = [command for command, _ in next_commands(config(objective, **dataset), RUN)]
    assert [command.split()[0] for command in found] == commands
    assert all("run=outputs/cats" in command or "experiment=" in command for command in found)
    if dataset is FOLDER and "JEPA" in objective:
        assert "images='/data/my cats/train'" in found[-1], "its own pictures, quoted for the shell"
    assert len(closing_lines(config(objective, **dataset), RUN)) == 4


TWO_ROOMS = {"_target_": "jepa.envs.two_rooms.TwoRooms"}


@pytest.mark.parametrize(
    ("heads", "world", "plans"),
    [
        (["probe", "value", "policy"], {"env": TWO_ROOMS, "num_actions": 0}, ["", "planner=icem name=world-icem"]),
        (["metric"], {"env": TWO_ROOMS, "num_actions": 0}, ["", "planner=icem cost=metric_distance name=world-icem"]),
        (["value", "policy"], {"env": TWO_ROOMS, "num_actions": 7}, ["", "planner=policy name=world-policy"]),
        (["value"], {"env": TWO_ROOMS, "num_actions": 7}, [""]),
        (["reward", "continuation", "return"], {"env": TWO_ROOMS, "num_actions": 7}, ["cost=return"]),
        (["reward", "continuation"], {"env": TWO_ROOMS, "num_actions": 0}, ["cost=reward"]),
        (["decoder"], {"env": TWO_ROOMS, "num_actions": 0}, []),
        (["value", "policy"], {"env": {}, "num_actions": 0}, []),
    ],
)
def test_the_next_commands_of_a_world_are_those_that_its_heads_and_actions_allow(
    heads: list[str], world: dict[str, Any], plans: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "world"
    written(folder, world)
    made = config("jepa.objectives.dynamics.Dynamics")
    made["objective"]["heads"] = heads
    *planned, last = [command for command, _ in next_commands(made, folder)]
    assert planned == [f"jepa-plan run={folder} {plan}".strip() for plan in plans]
    assert last == f"jepa-export run={folder} format=safetensors"


def written(folder: Path, world: dict[str, Any]) -> None:
    checkpoint = folder / "checkpoints" / "step_00000009"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps({"world": world}))


def test_the_world_of_a_run_of_jepa_rl_has_no_next_commands(tmp_path: Path) -> None:
    written(tmp_path / "world", {"env": TWO_ROOMS, "num_actions": 7})
    (tmp_path / "replay").mkdir()
    made = config("jepa.objectives.dynamics.Dynamics")
    made["objective"]["heads"] = ["reward", "continuation"]
    assert closing_lines(made, tmp_path / "world") == []


def test_the_table_of_a_run_stopped_before_an_evaluation_says_so() -> None:
    rows: list[dict[str, float]] = [START, {"step": 7, "train/loss": 1.0}]
    assert table_rows(rows)[-1][0] == "trained encoder, not evaluated yet"
    assert table_rows([*rows, {"step": 9, "probe/knn_top1": 21.0}])[-1][0] == "trained encoder, step 9"
