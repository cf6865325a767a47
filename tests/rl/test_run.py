"""jepa-rl in a corridor: a policy that is learnt in dreams, and a run that goes on where it was killed."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from corridor import Corridor

import jepa
from jepa.cli.play import main as play
from jepa.cli.rl import main as rl
from jepa.config import ConfigError, compose_rl
from jepa.rl import run as rl_run
from jepa.rl.dreams import load_dream_world
from jepa.rl.policy import load_actor
from jepa.rl.run import Parts

CORRIDOR = ["env=corridor", f"--config-dir={Path(__file__).parents[1] / 'files' / 'corridor'}"]
SMALL = [
    *CORRIDOR, "episode_steps=12", "batch_size=32",
    "horizon=4", "success_return=0", "eval_episodes=30", "log_every=10", "videos=1", "env_steps=600",
]  # fmt: skip
WORLD = ["encoder.patch_size=4", "encoder.embed_dim=16", "encoder.num_heads=1", "evaluator=[]"]
JEPA = [
    *WORLD,
    "num_frames=4",
    "batch_size=32",
    "predictor.width=32",
    "predictor.state_dim=8",
    "objective.head_steps=400",
]
IRIS = [*WORLD, "num_frames=5", "batch_size=32", "lr=2e-3", "objective.num_codes=8", "objective.code_dim=8"]
IRIS += ["objective.dynamics_width=32", "objective.dynamics_depth=1", "objective.dynamics_num_heads=2"]
IRIS += ["objective.decoder_num_heads=1"]


def settings_of(world: str, *others: str) -> list[str]:
    settings = ",".join(f"'{one}'" for one in (JEPA if world == "jepa" else IRIS))
    steps = ["world_steps=300", "policy_steps=60"]
    return [*SMALL, f"world={world}", f"world.settings=[{settings}]", *steps, *others]


def results_of(name: str) -> dict[str, Any]:
    return json.loads(Path("outputs", name, "results.json").read_text())


@pytest.fixture(autouse=True)
def _quick_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jepa.rl.follow.STEPS", 60)  # of 400; tests/rl/test_follow.py has what it takes to follow


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a policy of each world was trained."""
    folder = tmp_path_factory.mktemp("trained")
    before = Path.cwd()
    os.chdir(folder)
    for world in ("jepa", "iris"):
        assert rl(settings_of(world, f"name={world}")) == 0
    os.chdir(before)
    return folder


@pytest.mark.parametrize("world", ["jepa", "iris"])
def test_a_policy_that_dreams_reaches_the_end_of_the_corridor(
    world: str, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained)
    results = results_of(world)
    rows = {row["policy"]: row for row in results["rows"]}
    assert rows[world]["success"] == 1
    assert rows[world]["mean_steps"] < 3.5
    assert rows[world]["mean_steps"] < rows["random"]["mean_steps"]
    assert rows[world]["env_steps"] == 600
    truth = results["truth"]
    assert truth["doubts"] == []
    assert truth["exact_frames"] > 0.8
    assert truth["reward_recall"] == 1
    assert truth["false_rewards"] == 0
    assert truth["imagined_return"] == pytest.approx(1, abs=0.25)
    assert (world == "iris") == ("distinct" in truth)


def test_the_folder_has_page_video_and_films(trained: Path) -> None:
    for world in ("jepa", "iris"):
        page = (trained / "outputs" / world / "rl.html").read_text()
        assert "The imagined return is trustworthy" in page
        assert "data:image/png" in page
        assert re.search(r"Where it ran.*CPU; .* CPU cores; python 3\.", page)
        assert (trained / "outputs" / world / "media" / "dreams.mp4").stat().st_size > 500
        assert "success" in (trained / "outputs" / world / "rl.md").read_text()


def test_the_same_command_again_changes_nothing(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)
    before, begun = results_of("jepa"), time.perf_counter()
    assert rl(settings_of("jepa", "name=jepa")) == 0
    assert results_of("jepa") == before
    assert time.perf_counter() - begun < 10
    assert rl(settings_of("jepa", "name=jepa", "videos=2", "baselines=[]")) == 0
    assert results_of("jepa") == before
    assert Path("outputs/jepa/media/dream-1.png").exists()


@pytest.mark.parametrize("world", ["jepa", "iris"])
def test_a_loaded_policy_acts_in_a_loop_as_it_was_evaluated(
    world: str, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained)
    policy = jepa.load_policy(f"outputs/{world}")
    env = Corridor()
    for start in range(3):
        frames, _ = env.reset([start])
        policy.reset()
        for _ in range(4 - start - 1):
            action = policy.act(frames[0].transpose(1, 2, 0))
            assert isinstance(action, int)
            after = env.step(np.array([action]))
            frames = after.frames
        assert after.terminated.all()
    with pytest.raises(ValueError, match=r"uint8 \(1, 8, 8\) or \(8, 8, 1\)"):
        policy.act(np.zeros((9, 9, 1), dtype=np.uint8))


@pytest.mark.parametrize("world", ["jepa", "iris"])
def test_a_dream_does_what_the_environment_does(world: str, trained: Path) -> None:
    """Frame, action and reward of the same step belong together, and a policy's pictures are those of the world."""
    dreams = load_dream_world(trained / "outputs" / world / "world")
    env = Corridor()
    frames, _ = env.reset([1, 2, 0])
    encoded = dreams.encode(frames)
    idle = torch.zeros(3, dreams.context - 1, dtype=torch.long)
    dream = dreams.dream(encoded[:, None].repeat_interleave(dreams.context, 1), idle, None)
    for actions in ([2, 1, 1], [0, 1, 1], [1, 2, 0]):
        after, outcome = env.step(np.array(actions)), dream.step(torch.tensor(actions))
        alive = ~env.has_ended | after.terminated
        columns = dreams.draw(outcome.encoded).float().mean(dim=(1, 2)).unflatten(1, (4, -1)).mean(dim=2)
        assert (columns.argmax(dim=1).numpy() == after.states[:, 0])[alive].all()
        assert np.abs(outcome.rewards.numpy() - after.rewards)[alive].max() < 0.3
        assert np.abs((1 - outcome.goes_on.numpy()) - after.terminated)[alive].max() < 0.4


def test_episodes_are_played_under_the_policy_a_script_and_typed_keys(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(trained)
    common = ["run=outputs/jepa", *CORRIDOR]
    assert play(common) == 0
    assert re.search(r"real 1, dreamt (1|0\.9)\d*; the episode has ended; the dream has ended", capsys.readouterr().out)
    assert play([*common, "actions=[2,2]"]) == 0
    assert "step 2: real 0" in capsys.readouterr().out
    Path("script.txt").write_text("1\n1\n1\n")
    assert play([*common, "actions=script.txt"]) == 0
    assert "real 1" in capsys.readouterr().out
    assert Path("outputs/jepa/play/play.mp4").stat().st_size > 500
    monkeypatch.setattr(sys, "stdin", iter(["dx\n", "ddd\n"]))
    assert play([*common, "typed=true", "keys={d:1}"]) == 0
    out = capsys.readouterr().out
    assert "x: no such key; d for 1, 0, 1, 2" in out
    assert "real 1, dreamt" in out
    assert play([*common, "actions=[7]"]) == 2
    assert "valid: whole numbers from 0 to 2" in capsys.readouterr().err


def test_an_environment_of_a_file_that_is_not_ours_is_not_built(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(trained)
    assert play(["run=outputs/jepa"]) == 2
    assert "is no environment of this package; give env= on the command line" in capsys.readouterr().err


def test_a_trained_policy_collects(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jepa.rl.policy import Trained

    monkeypatch.chdir(trained)
    policy = Trained(run="outputs/jepa", greedy=True)
    policy.begin(Corridor().actions, [0, 1], 4)
    frames, states = Corridor().reset([0, 1])
    assert policy.act(0, frames, states).tolist() == [1, 1]
    with pytest.raises(ConfigError, match="it was trained for"):
        policy.begin(Corridor(continuous=True).actions, [0], 4)


def test_what_an_actor_does_depends_on_its_own_episode_alone(trained: Path) -> None:
    actor = load_actor(trained / "outputs" / "jepa")
    actor.explore = 0.5
    env, alone = Corridor(), []
    for seed in range(6):
        frames, states = env.reset([seed])
        actor.begin(env.actions, [seed], 4)
        alone.append(actor.act(0, frames, states)[0])
    frames, states = env.reset(range(6))
    actor.begin(env.actions, range(6), 4)
    assert actor.act(0, frames, states).tolist() == alone
    assert len(set(alone)) > 1  # half of them are drawn


def test_the_shares_of_the_rounds_add_up() -> None:
    config = compose_rl(["rounds=4", "env_steps=1003", "first_steps=400", "world_steps=10", "policy_steps=7"])
    parts = Parts.of(config)
    assert parts.env_steps == [400, 601, 802, 1003]
    assert parts.world_steps == [3, 5, 7, 10]
    assert parts.policy_steps[-1] == 7
    assert all(np.diff([0, *parts.policy_steps]) > 0)
    assert [parts.round_of(step) for step in (0, *parts.policy_steps)] == [0, 1, 2, 3, 4]
    assert Parts.of(replace(config, first_steps=None)).env_steps == [250, 501, 752, 1003]


def test_what_the_policy_has_collected_is_learnt_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rounds: later episodes are the policy's and better, earlier ones stay, the world has seen all."""
    monkeypatch.chdir(tmp_path)
    assert (
        rl(
            settings_of(
                "jepa", "name=rounds", "rounds=3", "env_steps=900", "explore=0.05", "train=['objective.head_steps=120']"
            )
        )
        == 0
    )
    results = results_of("rounds")
    assert [entry["env_steps"] for entry in results["history"]] == [300, 600, 900]
    store = jepa.load_policy("outputs/rounds").actor.world
    assert store is not None
    lengths = np.load(Path("outputs/rounds/replay/group-000000/lengths.npy"))
    last = np.load(sorted(Path("outputs/rounds/replay").glob("group-*/lengths.npy"))[-1])
    assert last.mean() < lengths.mean()
    assert "Over the run" in Path("outputs/rounds/rl.html").read_text()
    assert capsys.readouterr().err.count("the policy follows its world") == 2


def test_runs_of_several_seeds_stand_in_one_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    short = ["world_steps=4", "policy_steps=4", "env_steps=60", "eval_episodes=4", "videos=0"]
    assert rl(settings_of("jepa", *short, "name=both", "seed=0,1")) == 0
    rows = results_of("both")["rows"]
    means = [row for row in rows if row["seed"] is None]
    assert [row["policy"] for row in means] == ["jepa", "random"]
    assert means[0]["episodes"] == 8
    singles = [row["mean_return"] for row in rows if row["policy"] == "jepa" and row["seed"] is not None]
    assert means[0]["mean_return"] == pytest.approx(np.mean(singles))
    assert Path("outputs/both/seed=1/rl.html").exists()
    printed = capsys.readouterr()
    assert "rl      outputs/both/seed=1: a policy that learns in the dreams of a world (jepa)" in printed.err
    assert printed.out.count("jepa                     0") == 1, "a row as soon as the policy is evaluated"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rounds=5000"], "env_steps=4000 (rl.yaml) with rounds=5000: every round needs at least one"),
        (["first_steps=10"], "first_steps=10: with one round all steps are the first"),
        (["baselines=[rndom]"], 'no such baseline; did you mean "random"?'),
        (["world.settings=['lr=-1']"], "lr=-1"),
        (["lr=1,0"], "lr=0: lr=0: must be above 0"),
        (["train=['encoder.dept=1']"], 'did you mean "encoder.depth"?'),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_collected(
    overrides: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert rl([*SMALL[:2], "name=refused", *overrides]) == 2
    assert message in capsys.readouterr().err
    assert not Path("outputs/refused").exists()


@pytest.mark.parametrize(
    ("status", "expected", "message"), [(1, 1, ""), (128 + signal.SIGTERM, 130, "stopped by SIGTERM")]
)
def test_how_the_processes_of_a_world_end_is_how_the_run_ends(
    status: int, expected: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rl_run, "train", lambda *_: status)
    assert rl(settings_of("jepa", "name=ended", "env_steps=30")) == expected
    ending = json.loads(Path("outputs/ended/run.json").read_text())
    assert ending["status"] == ("failed" if expected == 1 else "stopped")
    assert message in ending["message"]
    assert (expected == 1) == ("its training ended with status 1" in capsys.readouterr().err)


@pytest.mark.slow
@pytest.mark.parametrize("world", ["jepa", "iris"])
def test_a_run_that_is_killed_again_and_again_ends_in_the_same_table(world: str, tmp_path: Path) -> None:
    """Children of this process, which has imported everything already, are killed at other times each time."""
    short = ["world_steps=40", "policy_steps=30", "env_steps=400", "rounds=2", "eval_episodes=10", "videos=0"]
    overrides = settings_of(
        world, *short, "save_every=3", "train=['save_every=5','objective.heads=[reward,continuation]']"
    )
    if world == "iris":
        overrides[-1] = "train=['save_every=5']"
    results = []
    for name, kills in (("whole", 0), ("killed", 20 if world == "iris" else 8)):
        folder = tmp_path / name
        folder.mkdir()
        for number in range(kills):
            kill_after(0.15 + 0.13 * number % 1.7, folder, overrides)
        assert kill_after(None, folder, overrides) == 0
        found = json.loads((folder / "outputs/run/results.json").read_text())
        rows = [
            {key: value for key, value in row.items() if key != "seconds"} for row in found["rows"] + found["history"]
        ]
        results.append((rows, found["truth"]))
    assert results[0] == results[1]


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_asked_to_stop_saves_and_goes_on(signum: signal.Signals, tmp_path: Path) -> None:
    overrides = settings_of("jepa", "world_steps=4", "policy_steps=4000", "env_steps=60", "eval_episodes=2", "videos=0")
    overrides += ["train=['objective.heads=[reward,continuation]','objective.head_steps=4']", "log_every=1"]
    run = tmp_path / "outputs" / "run"

    def learns() -> bool:
        return (run / "metrics.jsonl").exists() and "policy/return" in (run / "metrics.jsonl").read_text()

    assert kill_after(learns, tmp_path, overrides, signum) == 130
    ending = json.loads((run / "run.json").read_text())
    assert ending["status"] == "stopped"
    assert ending["message"] == f"stopped by {signum.name}"
    done = max(int(path.name.removeprefix("step_")) for path in (run / "checkpoints").glob("step_*"))
    assert 0 < done < 4000
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert max(row["step"] for row in rows) == done


def kill_after(
    when: float | Callable[[], bool] | None, folder: Path, overrides: list[str], signum: int = signal.SIGKILL
) -> int:
    """Exit status of the command in a child that gets a signal after some seconds, or when something has happened."""
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        torch.set_num_threads(1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os._exit(rl([*overrides, "name=run"]))
    if callable(when):
        while not when():
            time.sleep(0.02)
    elif when is not None:
        time.sleep(when)
    if when is not None:
        os.kill(child, signum)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
