"""jepa-plan with an experiment of one's own: a world of another project that has rewards and no goals."""

import json
from pathlib import Path

import pytest
from PIL import Image

from jepa.cli.plan import main

pytest.importorskip("tiny_jepa")
CONF = Path(__file__).parents[1] / "helpers" / "conf"
TRAIN = [
    *("dataset.episodes=30", "dataset.steps=12", "encoder.patch_size=8", "encoder.embed_dim=16", "encoder.depth=1"),
    *("encoder.num_heads=1", "num_frames=4", "batch_size=16", "steps=10", "num_workers=0", "logger=none"),
    *("evaluator=[]", "predictor.width=32", "predictor.state_dim=16", "predictor.history=2", "objective.head_steps=20"),
    "objective.heads=[reward,continuation,return,decoder]",
]
PLAN = [
    *("--config-dir", str(CONF), "experiment=orby", "train=[" + ",".join(f"'{change}'" for change in TRAIN) + "]"),
    *("env=orby", "planner=categorical_cem", "planner.samples=8", "planner.elites=4"),
    *("planner.iterations=2", "planner.horizon=3", "episodes=3", "budget=6", "videos=2"),
]


def test_a_world_with_rewards_and_no_goals_is_trained_and_planned_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*PLAN, "cost=gc_value"]) == 2
    assert "Orby has no goals; choose cost=return" in capsys.readouterr().err
    assert main([*PLAN, "cost=return"]) == 0
    rows = json.loads(Path("outputs/plan/results.json").read_text())["rows"]
    assert [row["policy"] for row in rows] == ["random", "categorical_cem"]
    for row in rows:
        assert row["mean_return"] == sum(outcome["reward"] for outcome in row["outcomes"]) / 3
        assert [outcome["steps"] for outcome in row["outcomes"]] == [6, 6, 6]
        assert "success_strict" not in row
    starts = [[outcome["start"] for outcome in row["outcomes"]] for row in rows]
    assert starts[0] == starts[1]
    page = Path("outputs/plan/plan.html").read_text()
    assert "Sum of the rewards in 6 steps" in page
    assert "Success over distance" not in page
    assert "goal" not in page
    assert len(list(Path("outputs/plan/media").glob("strip-*.png"))) == 2
    frames = [Image.open(path) for path in sorted(Path("outputs/plan/media").glob("strip-*.png"))]
    assert len({image.width for image in frames}) == 1
    assert frames[0].width < 8 * 64  # seven frames, and no goal beside them
