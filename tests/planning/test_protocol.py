"""The protocol of planning: frozen tasks, episodes until the strict criterion, and rows of the contract."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from jepa.envs.two_rooms import MODERATE, STRICT, TwoRooms
from jepa.envs.types import EnvTraits, Task, Transition
from jepa.errors import ConfigError, FileError
from jepa.planning.control import Function, Goals
from jepa.planning.protocol import (
    Gain,
    Outcome,
    Played,
    frozen_tasks,
    make_tasks,
    mean_row,
    play,
    row,
)
from jepa.planning.report import returned
from jepa.reports.statistics import NORMAL_QUANTILE, wilson
from jepa.types import ActionSpace

FIELDS = {
    *("policy", "cost", "seed", "episodes", "success_moderate", "success_strict", "interval_moderate"),
    *("interval_strict", "seconds_per_episode", "ms_per_step", "predictor_rows", "outcomes"),
}
OUTCOME = {"start", "goal", "steps", "distance", "moderate", "strict"}


def test_tasks_depend_on_the_seed_and_more_of_them_begin_alike() -> None:
    env = TwoRooms(walls="random")
    few, many, other = make_tasks(env, 3, 0), make_tasks(env, 8, 0), make_tasks(env, 3, 1)
    np.testing.assert_array_equal(few, many[:3])
    assert not np.array_equal(few, other)
    assert len({tuple(task.start) for task in many}) == 8


class EveryOtherIsSolved(TwoRooms):
    """Tasks with even seeds have their goal at the start."""

    def task(self, seed: int) -> Task:
        task = super().task(seed)
        return task if seed % 2 else Task(task.start, task.start)


class AllSolved(TwoRooms):
    def task(self, seed: int) -> Task:
        task = super().task(seed)
        return Task(task.start, task.start + np.array([MODERATE - 0.1, 0, 0, 0], dtype=np.float32))


class NoTasks(TwoRooms):
    thresholds = {}


def test_tasks_that_are_solved_at_their_start_are_left_out() -> None:
    env = EveryOtherIsSolved()
    tasks = make_tasks(env, 20, 0)
    assert len(tasks) == 20
    assert all(env.distance(task.start[None], task.goal[None])[0] >= MODERATE for task in tasks)


def test_an_environment_without_tasks_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"NoTasks has no tasks.*env=two_rooms"):
        make_tasks(NoTasks(), 1, 0)
    with pytest.raises(ConfigError, match="solved at their start"):
        make_tasks(AllSolved(), 1, 0)


def test_tasks_are_frozen_in_a_file_with_a_hash_of_their_numbers(tmp_path: Path) -> None:
    env = TwoRooms()
    tasks, digest = frozen_tasks(tmp_path, env, 4, 0)
    text = (tmp_path / "tasks.json").read_bytes()
    again, same = frozen_tasks(tmp_path, env, 4, 0)
    assert (tmp_path / "tasks.json").read_bytes() == text
    assert digest == same
    assert digest.startswith("sha256:")
    assert len(digest) == 7 + 64
    np.testing.assert_array_equal(tasks, again)
    np.testing.assert_array_equal(tasks, make_tasks(env, 4, 0))
    assert frozen_tasks(tmp_path / "elsewhere", env, 4, 0)[1] == digest
    assert frozen_tasks(tmp_path / "other", env, 4, 1)[1] != digest
    content = json.loads(text)
    content["tasks"][0]["start"][0] += 1
    (tmp_path / "tasks.json").write_text(json.dumps(content))
    changed, new = frozen_tasks(tmp_path, env, 4, 0)
    assert new != digest
    assert changed[0].start[0] == pytest.approx(tasks[0].start[0] + 1)


@pytest.mark.parametrize(
    ("env", "count", "seed", "values"),
    [
        (TwoRooms(), 4, 2, ["seed=0", "now 2"]),
        (TwoRooms(), 5, 0, ["episodes=4", "now 5"]),
        (TwoRooms(walls="random"), 4, 0, ["'fixed'", "'random'"]),
    ],
)
def test_tasks_of_something_else_are_refused_with_both_values(
    env: TwoRooms, count: int, seed: int, values: list[str], tmp_path: Path
) -> None:
    frozen_tasks(tmp_path, TwoRooms(), 4, 0)
    with pytest.raises(ConfigError, match="give another name=") as refusal:
        frozen_tasks(tmp_path, env, count, seed)
    assert all(value in str(refusal.value) for value in values)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["tasks"].pop(),
        lambda content: content["tasks"][1]["goal"].pop(),
        lambda content: content["tasks"][1].update(start="x"),
        lambda content: content["tasks"][1].pop("goal"),
        lambda content: content.update(tasks=3),
        lambda content: content.pop("seed"),
    ],
)
def test_a_damaged_file_of_tasks_is_refused_by_name(change, tmp_path: Path) -> None:
    frozen_tasks(tmp_path, TwoRooms(), 4, 0)
    path = tmp_path / "tasks.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(FileError, match=r"tasks\.json"):
        frozen_tasks(tmp_path, TwoRooms(), 4, 0)


def test_a_file_of_tasks_that_is_cut_off_is_refused_by_name(tmp_path: Path) -> None:
    frozen_tasks(tmp_path, TwoRooms(), 4, 0)
    path = tmp_path / "tasks.json"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(FileError, match=r"tasks\.json"):
        frozen_tasks(tmp_path, TwoRooms(), 4, 0)


class Walk:
    """Moves each dot by given steps along x; keeps what it was told."""

    def __init__(self, moves: list[list[float]]) -> None:
        self.moves = np.array(moves, dtype=np.float32)
        self.active: list[list[bool]] = []

    def begin(self, goals: Goals, seeds, num_steps: int) -> None:
        self.begun = (goals, list(seeds), num_steps)

    def act(self, step: int, frames: np.ndarray, states: np.ndarray, active: np.ndarray) -> np.ndarray:
        self.active.append(active.tolist())
        return np.stack([self.moves[:, step], np.zeros(len(states), np.float32)], axis=1)


def tasks_along_x(distances: list[float]) -> list[Task]:
    """Starts at x = 8 and goals to the right of them, in the left room."""
    start = np.array([8, 30, 32, 32], dtype=np.float32)
    return [Task(start, start + np.array([d, 0, 0, 0], dtype=np.float32)) for d in distances]


def test_steps_count_until_the_strict_criterion_and_both_criteria_are_told() -> None:
    walk = Walk([[4, 4, 4, 0, 0], [4, 1, 0, 0, 0], [4, -4, 0, 0, 0]])
    played = play(TwoRooms(), walk, tasks_along_x([11, 8, 12]), budget=5)
    first, second, third = played.outcomes
    assert (first.steps, first.moderate, first.strict) == (3, True, True)
    assert first.distance == pytest.approx(1)
    assert (second.steps, second.moderate, second.strict) == (5, True, False)
    assert second.distance == pytest.approx(3)
    assert (third.steps, third.moderate, third.strict) == (5, False, False)
    assert third.distance == pytest.approx(8)  # the least on the way
    assert walk.active == [[True] * 3] * 3 + [[False, True, True]] * 2
    assert played.num_steps == 5
    assert (first.start[:2], first.goal[:2]) == ([8, 30], [19, 30])


def test_thresholds_are_not_met_at_their_own_value() -> None:
    played = play(TwoRooms(), Walk([[0], [0]]), tasks_along_x([MODERATE, MODERATE - 0.5]), budget=1)
    assert [outcome.moderate for outcome in played.outcomes] == [False, True]
    assert STRICT < MODERATE


def test_all_episodes_stop_when_all_are_over() -> None:
    played = play(TwoRooms(), Walk([[4, 0, 0], [4, 0, 0]]), tasks_along_x([5, 5.5]), budget=3)
    assert played.num_steps == 1


def test_controllers_get_pictures_and_states_of_the_goals() -> None:
    env, walk = TwoRooms(), Walk([[0], [0]])
    tasks = tasks_along_x([5, 9])
    play(env, walk, tasks, budget=1)
    goals, seeds, num_steps = walk.begun
    states = np.stack([task.goal for task in tasks])
    np.testing.assert_array_equal(goals.states, states)
    np.testing.assert_array_equal(goals.frames, env.render(states))
    assert (seeds, num_steps) == ([0, 1], 1)


def test_shown_episodes_have_a_frame_more_than_steps() -> None:
    env = TwoRooms()
    played = play(env, Walk([[4, 0, 0], [0, 0, 0], [0] * 3]), tasks_along_x([5, 9, 9]), budget=3, num_shown=2)
    assert [len(frames) for frames in played.frames] == [2, 4]
    for frames, states in zip(played.frames, played.states, strict=True):
        np.testing.assert_array_equal(frames, env.render(states))


def test_the_expert_solves_every_task_and_the_straight_line_does_not() -> None:
    env = TwoRooms()
    tasks = make_tasks(env, 30, 0)
    expert, line = (play(env, Function(f), tasks, budget=60).outcomes for f in (env.expert, env.straight_line))
    assert all(outcome.strict for outcome in expert)
    assert 0 < sum(outcome.strict for outcome in line) < 30
    assert EnvTraits.of(env).thresholds == {"moderate": MODERATE, "strict": STRICT}


def played(*outcomes: tuple[bool, bool]) -> Played:
    return Played([Outcome([0.0], [1.0], 4, 0.5, m, s) for m, s in outcomes], 4, 2.0)


def test_a_row_has_exactly_the_fields_of_the_contract() -> None:
    found = row("cem", "gc_value", 3, played((True, True), (True, False), (False, False), (False, False)),
                seconds_per_episode=1.23456, predictor_rows=99.6)  # fmt: skip
    assert found.keys() == FIELDS
    assert (found["policy"], found["cost"], found["seed"], found["episodes"]) == ("cem", "gc_value", 3, 4)
    assert (found["success_moderate"], found["success_strict"]) == (0.5, 0.25)
    assert found["interval_moderate"] == list(wilson(2 / 4, 4))
    assert found["interval_strict"] == list(wilson(1 / 4, 4))
    assert found["ms_per_step"] == pytest.approx(2000 / 16)
    assert found["predictor_rows"] == 100
    assert all(outcome.keys() == OUTCOME for outcome in found["outcomes"])
    assert json.loads(json.dumps(found)) == found


def test_the_mean_row_has_no_seed_and_the_intervals_of_all_episodes() -> None:
    rows = [
        row("cem", "gc_value", seed, played(*outcomes), seconds_per_episode=seconds, predictor_rows=10)
        for seed, seconds, outcomes in [(0, 1.0, [(True, True)] * 3), (1, 3.0, [(True, False), (False, False)] * 2)]
    ]
    mean = mean_row(rows)
    assert mean.keys() == FIELDS
    assert mean["seed"] is None
    assert mean["episodes"] == 7
    assert (mean["success_moderate"], mean["success_strict"]) == (pytest.approx(5 / 7), pytest.approx(3 / 7))
    assert mean["interval_strict"] == list(wilson(3 / 7, 7))
    assert mean["seconds_per_episode"] == 2.0


class Countdown:
    """An environment without goals: every step gives its action, and the world ends after 1, 2 or 3 steps."""

    settings: dict = {}
    actions = ActionSpace(num_actions=4)
    frame_shape = (1, 2, 2)
    state_names = ("left",)

    def reset(self, seeds, states=None, goals=None):
        assert states is None
        assert goals is None
        self.left = np.array([[1 + seed % 3] for seed in seeds], dtype=np.float32)
        return self._frames(), self.left.copy()

    def step(self, actions: np.ndarray) -> Transition:
        self.left = self.left - 1
        ended = self.left[:, 0] <= 0
        return Transition(self._frames(), self.left.copy(), actions.astype(np.float32), ended, np.zeros_like(ended))

    def _frames(self) -> np.ndarray:
        return np.zeros((len(self.left), 1, 2, 2), dtype=np.uint8)

    def close(self) -> None: ...


class Three:
    def begin(self, goals: Goals, seeds, num_steps: int) -> None: ...

    def act(self, step: int, frames: np.ndarray, states: np.ndarray, active: np.ndarray) -> np.ndarray:
        return np.full(len(frames), 3)


def test_without_goals_rewards_are_summed_until_the_world_ends(tmp_path: Path) -> None:
    env = Countdown()
    tasks, digest = frozen_tasks(tmp_path, env, 12, 0)
    lengths = [1 + int(task.start[0]) % 3 for task in tasks]
    assert set(lengths) == {1, 2, 3}
    assert frozen_tasks(tmp_path / "other", env, 12, 1)[1] != digest
    found = play(env, Three(), tasks, budget=2, num_shown=12)
    expected = [min(2, length) for length in lengths]
    assert [gain.steps for gain in found.outcomes] == expected
    assert [gain.reward for gain in found.outcomes] == [3.0 * steps for steps in expected]
    assert [len(states) for states in found.states] == [steps + 1 for steps in expected]


def test_a_row_without_goals_has_the_mean_return_and_no_success() -> None:
    gains = [Gain([0.0], 1.0, 4), Gain([1.0], 3.0, 4)]
    found = row("cem", "return", 0, Played(gains, 4, 1.0), seconds_per_episode=1.0, predictor_rows=1)
    assert found["mean_return"] == 2
    half = NORMAL_QUANTILE / 2**0.5
    assert found["interval_return"] == pytest.approx([2 - half, 2 + half])
    assert returned({"mean_return": -142.26, "interval_return": [-179.44, -105.08]}) == "-142.26 (-179.44 to -105.08)"
    assert not [name for name in found if name.startswith("success")]
    assert mean_row([found, found])["mean_return"] == 2
    assert mean_row([found, found])["episodes"] == 4
