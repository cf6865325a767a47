"""jepa-plan on experiments: encoders that are compared, discrete actions, and what a killed command leaves."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import forked
import pytest
from tiny_world import TINY

from jepa import load_encoder
from jepa.cli import plan
from jepa.cli.plan import main
from jepa.config import Composer, ConfigError, compose_plan
from jepa.planning import plannability
from jepa.planning import run as planning
from jepa.planning.run import by_encoder, with_means
from jepa.planning.worlds import experiment_runs
from jepa.reports.statistics import wilson

SMALL = [
    *("episodes=2", "budget=4", "videos=0", "baselines=[random]", "planner.samples=4", "planner.elites=2"),
    *("planner.iterations=1", "planner.horizon=2", "planner.execute=2"),
]
TRAIN = [text for text in TINY if not text.startswith("experiment=")]


def train_as(*overrides: str) -> str:
    """The tiny world's overrides as train=[...]."""
    return f"train=[{','.join(repr(text) for text in (*TRAIN, *overrides))}]"


def runs(*overrides: str, train: str = "train=[]") -> list[Any]:
    config = compose_plan(["experiment=two_rooms", "compare=encoders", train, *overrides])
    return experiment_runs(config, Composer())


def test_encoders_are_trained_for_as_many_steps_and_frames_as_the_worlds() -> None:
    composer, found = Composer(), {run.encoder: run for run in runs()}
    jepa = found["jepa"].config(composer)
    assert jepa.name == "two_rooms"
    assert not jepa.objective["freeze"]
    for name in ("mae", "vae", "autoencoder"):
        before = found[name].pretraining
        assert before.objective["_target_"].rpartition(".")[2].lower() == name
        assert before.name == f"two_rooms-{name}-encoder"
        assert before.steps == jepa.steps
        assert before.batch_size * before.num_frames == jepa.batch_size * jepa.num_frames
        assert (before.dataset, before.encoder, before.lr) == (jepa.dataset, jepa.encoder, jepa.lr)
        assert f"encoder.weights=outputs/{before.name}" in found[name].overrides
    for name in ("untrained", "pixels"):
        assert found[name].pretraining is None


def test_worlds_differ_in_their_encoder_alone() -> None:
    composer, found = Composer(), runs("encoders=[jepa,untrained,pixels]")
    jepa, *others = (run.config(composer) for run in found)
    for other in others:
        assert other.objective == jepa.objective | {"freeze": True}
        for key in ("predictor", "regularizer", "dataset", "steps", "batch_size", "lr", "num_frames", "seed"):
            assert getattr(other, key) == getattr(jepa, key)
    assert others[0].encoder == jepa.encoder
    assert others[1].encoder == {"_target_": "jepa.encoders.pixels.PixelEncoder", "patch_size": 8}


def test_overrides_reach_the_trainings_that_know_them() -> None:
    train = "train=['encoder.patch_size=16','predictor.width=64','encoder.embed_dim=16','objective.head_steps=9']"
    composer, found = Composer(), {run.encoder: run for run in runs("encoders=[jepa,mae,pixels]", train=train)}
    assert found["mae"].pretraining.encoder["embed_dim"] == 16
    pixels = found["pixels"].config(composer)
    assert (pixels.encoder["patch_size"], pixels.predictor["width"], pixels.objective["head_steps"]) == (16, 64, 9)


def test_seeds_and_sources_have_worlds_of_their_own() -> None:
    names = [run.name for run in runs("seeds=2", "encoders=[jepa,timm:vit_tiny_patch16_224,jepa]")]
    assert names == [
        *("two_rooms", "two_rooms-timm_vit_tiny_patch16_224"),
        *("two_rooms-seed1", "two_rooms-timm_vit_tiny_patch16_224-seed1"),
    ]


def test_weights_that_read_other_channels_are_refused_before_the_first_world(tmp_path: Path) -> None:
    checkpoint = tmp_path / "photographs" / "checkpoints" / "step_00000001"
    checkpoint.mkdir(parents=True)
    state = checkpoint / "state.json"
    state.write_text(json.dumps({"clip_shape": [3, 1, 64, 64]}))
    source = str(tmp_path / "photographs")
    with pytest.raises(ConfigError, match=r"dataset.env.channels=1 .*photographs reads 3 channels, the data set has 1"):
        runs(f"encoders=[jepa,mae,{source}]")
    state.write_text(json.dumps({"clip_shape": [1, 1, 64, 64]}))
    assert [run.encoder for run in runs(f"encoders=[jepa,{source}]")] == ["jepa", source]


def test_a_comparison_without_a_number_of_steps_is_refused() -> None:
    with pytest.raises(ConfigError, match="says no steps"):
        runs(train="train=['steps=null']")


def test_pixels_learn_nothing_alone() -> None:
    with pytest.raises(ConfigError, match="has no weights to learn"):
        Composer().compose(["encoder=pixels", "objective=vae"])


def row(encoder: str, seed: int, wins: int) -> dict[str, Any]:
    """Of a planner with one world, 10 tasks."""
    world = f"{encoder}{seed}"
    outcomes = [{"moderate": number < wins, "strict": number < wins} for number in range(10)]
    rest = {
        "seconds_per_episode": 1.0,
        "ms_per_step": 1.0,
        "predictor_rows": 1.0,
        "key": json.dumps(["cem", "", world, seed, {}]),
    }
    return {
        "policy": "cem",
        "cost": "",
        "world": world,
        "seed": seed,
        "episodes": 10,
        "encoder": encoder,
        "outcomes": outcomes,
        **rest,
    }


def test_seeds_of_one_encoder_are_taken_together_and_encoders_stay_apart() -> None:
    rows = [row("mae", 0, 4), row("vae", 0, 1), row("mae", 1, 8), row("vae", 1, 3)]
    figures = {"mae0": {"a": 1.0, "b": 5.0}, "mae1": {"a": 3.0}, "vae0": {"a": 0.0}, "vae1": {"a": 1.0}}
    mae, vae = by_encoder(rows, "cem", figures)
    assert (mae["encoder"], mae["worlds"], mae["episodes"], mae["success_strict"]) == ("mae", ["mae0", "mae1"], 20, 0.6)
    assert mae["interval_strict"] == list(wilson(12 / 20, 20))
    assert (mae["plannable"], vae["plannable"]) == ({"a": 2.0}, {"a": 0.5})
    means = with_means(rows)[4:]
    assert [(mean["encoder"], mean["seed"], mean["success_strict"]) for mean in means] == [
        ("mae", None, 0.6),
        ("vae", None, 0.2),
    ]


def results(name: str) -> dict[str, Any]:
    return json.loads(Path("outputs", name, "results.json").read_text())


@pytest.fixture
def few_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plannability, "NUM_PAIRS", 20)


@pytest.mark.slow
def test_encoders_are_compared_and_a_killed_comparison_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few_pairs: None
) -> None:
    monkeypatch.chdir(tmp_path)
    train = train_as("objective.heads=[value]", "steps=4", "objective.head_steps=2")
    command = ["experiment=two_rooms", "compare=encoders", "encoders=[mae,pixels]", "name=encoders", train, *SMALL]

    def killed_after_the_first_training() -> int:
        train = plan._train

        def killed_after(run: Any, composer: Composer) -> None:
            train(run, composer)
            os.kill(os.getpid(), signal.SIGKILL)

        plan._train = killed_after
        return main(command)

    ended = forked.status(killed_after_the_first_training, tmp_path, tmp_path / "output")
    assert ended == -signal.SIGKILL, Path("output").read_text()
    trained = Path("outputs/two_rooms-mae/metrics.jsonl").read_bytes()
    assert main(command) == 0
    assert Path("outputs/two_rooms-mae/metrics.jsonl").read_bytes() == trained
    found = results("encoders")
    assert [(row["policy"], row["world"], row.get("encoder")) for row in found["rows"]] == [
        ("random", "", None),
        ("cem", "two_rooms-mae", "mae"),
        ("cem", "two_rooms-pixels", "pixels"),
    ]
    for row, summary in zip(found["rows"][1:], found["encoders"], strict=True):
        assert summary["encoder"] == row["encoder"]
        assert all(summary[key] == row[key] for key in ("success_strict", "interval_strict", "success_moderate"))
        assert summary["plannable"] == found["plannable"][row["world"]]
    page = Path("outputs/encoders/plan.html").read_text()
    assert "Encoders as world models" in page
    assert "two_rooms-pixels (pixels)" in page
    frozen, trained_before = (load_encoder(f"outputs/{name}") for name in ("two_rooms-mae", "two_rooms-mae-encoder"))
    assert frozen.state_dict()
    assert all((frozen.state_dict()[name] == tensor).all() for name, tensor in trained_before.state_dict().items())
    monkeypatch.setattr(planning, "run_one", None)
    assert main(command) == 0
    assert results("encoders") == found


@pytest.mark.slow
def test_an_experiment_with_discrete_actions_is_planned_from_its_episodes_to_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few_pairs: None, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("minigrid")
    monkeypatch.chdir(tmp_path)
    train = train_as("objective.heads=[probe,value,policy,clone]", "steps=4", "objective.head_steps=2", "image_size=40")
    assert main(["experiment=minigrid_plan", "name=grid", train, *SMALL, "baselines=[random,expert,clone]"]) == 0
    assert [row["policy"] for row in results("grid")["rows"]] == ["random", "expert", "clone", "categorical_cem"]
    assert "planner=categorical_cem, since the actions are discrete" in capsys.readouterr().err
    assert 0 <= results("grid")["plannable"]["minigrid_plan"]["true_action_rank"] <= 1


def test_a_continuous_planner_is_refused_for_discrete_actions_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("minigrid")
    monkeypatch.chdir(tmp_path)
    assert main(["experiment=minigrid_plan", "planner=cem"]) == 2
    assert "minigrid_plan has discrete actions, which CEM does not plan" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
