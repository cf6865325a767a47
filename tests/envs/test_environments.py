"""Contracts of every environment of conf/env: what is set is read, frames follow from states, batches do not matter."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jepa.config import Composer, build_with
from jepa.config.catalogue import conf_folder
from jepa.envs.types import EnvTraits, node_of

NAMES = sorted(path.stem for path in (conf_folder() / "env").glob("*.yaml"))
EXTRAS = {"gym": "gymnasium", "minigrid_empty": "minigrid", "minigrid_doorkey": "minigrid"}
EXTRAS |= {"point_maze": "gymnasium_robotics", "atari": "ale_py", "vizdoom_basic": "vizdoom"}
OPTIONS = {"gym": ["env.id=Pendulum-v1", "env.size=16", "env.frame_skip=2"], "minigrid_doorkey": ["env.size=24"]}
SETTABLE = ("two_rooms", "two_rooms_random", "minigrid_empty", "point_maze")


def build(name: str) -> Any:
    if name in EXTRAS:
        pytest.importorskip(EXTRAS[name])
    return build_with(Composer(None, "collect").compose([f"env={name}", *OPTIONS.get(name, [])])["env"])


@pytest.fixture(scope="module")
def built() -> Iterator[dict[str, Any]]:
    environments: dict[str, Any] = {}
    yield environments
    for env in environments.values():
        env.close()


@pytest.fixture(params=NAMES)
def env(request: pytest.FixtureRequest, built: dict[str, Any]) -> Any:
    if request.param not in built:
        built[request.param] = build(request.param)
    return built[request.param]


@pytest.fixture(params=SETTABLE)
def settable(request: pytest.FixtureRequest, built: dict[str, Any]) -> Any:
    if request.param not in built:
        built[request.param] = build(request.param)
    return built[request.param]


def random_actions(env: Any, count: int, num_steps: int) -> np.ndarray:
    random = np.random.default_rng(0)
    if env.actions.is_discrete:
        return random.integers(env.actions.num_actions, size=(num_steps, count))
    return random.uniform(env.actions.low, env.actions.high, size=(num_steps, count, len(env.actions.low))).astype(
        np.float32
    )


def states_of(env: Any, count: int) -> np.ndarray:
    """Different states, of tasks."""
    return np.stack([EnvTraits.of(env).task(seed).start for seed in range(count)])


def test_a_step_gives_what_the_protocol_says(env: Any) -> None:
    frames, states = env.reset([3, 4, 5])
    after = env.step(random_actions(env, 3, 1)[0])
    for shown, known in ((frames, states), (after.frames, after.states)):
        assert (shown.dtype, shown.shape) == (np.uint8, (3, *env.frame_shape))
        assert (known.dtype, known.shape) == (np.float32, (3, len(env.state_names)))
    assert after.rewards.dtype == np.float32
    assert after.terminated.dtype == after.truncated.dtype == np.bool_


def test_the_node_of_an_environment_builds_it_again(env: Any) -> None:
    again = build_with(node_of(env))
    assert (again.actions, again.frame_shape, again.state_names) == (env.actions, env.frame_shape, env.state_names)
    np.testing.assert_array_equal(again.reset([7])[0], env.reset([7])[0])
    again.close()


def test_a_batch_is_as_many_batches_of_one(env: Any) -> None:
    seeds, actions = [5, 11, 23], random_actions(env, 3, 5)
    start = env.reset(seeds)
    together = [start, *(env.step(action)[:2] for action in actions)]
    for row, seed in enumerate(seeds):
        alone = [env.reset([seed]), *(env.step(action[row : row + 1])[:2] for action in actions)]
        for pair, single in zip(together, alone, strict=True):
            for array, part in zip(pair, single, strict=True):
                np.testing.assert_array_equal(array[row], part[0])


def test_arrays_that_were_returned_do_not_change_later(env: Any) -> None:
    frames, states = env.reset([1, 2])
    kept = frames.copy(), states.copy()
    for action in random_actions(env, 2, 3):
        env.step(action)
    np.testing.assert_array_equal(frames, kept[0])
    np.testing.assert_array_equal(states, kept[1])


def test_actions_of_another_shape_or_out_of_bounds_are_refused(env: Any) -> None:
    env.reset([0, 1])
    action = random_actions(env, 2, 1)[0]
    beyond = np.full_like(action, env.actions.num_actions if env.actions.is_discrete else 1e3)
    for wrong, expected in ((action[:1], "expected"), (beyond, "valid"), (action * np.nan, "valid")):
        with pytest.raises(ValueError, match=expected):
            env.step(wrong)


def test_states_that_are_set_are_read_and_drawn(settable: Any) -> None:
    states = states_of(settable, 6)
    frames, known = settable.reset(range(6), states)
    np.testing.assert_array_equal(known, states)
    np.testing.assert_array_equal(frames, settable.render(states))


def test_frames_depend_on_the_state_only(settable: Any) -> None:
    settable.reset(range(4))
    for action in random_actions(settable, 4, 8):
        after = settable.step(action)
    np.testing.assert_array_equal(settable.render(after.states), after.frames)
    settable.reset(range(4, 8), after.states)
    np.testing.assert_array_equal(settable.reset(range(8, 12), after.states)[0], after.frames)


def test_simulated_steps_are_those_of_the_environment(settable: Any) -> None:
    states = settable.reset(range(4), states_of(settable, 4))[1]
    for action in random_actions(settable, 4, 10):
        expected = settable.simulate(states, action)
        states = settable.step(action).states
        np.testing.assert_allclose(expected, states, atol=1e-5)


def test_tasks_depend_on_the_seed_alone_and_are_not_solved_at_the_start(settable: Any) -> None:
    tasks = [settable.task(seed) for seed in range(40)]
    starts, goals = map(np.stack, zip(*tasks, strict=True))
    again = np.stack([settable.task(seed).start for seed in reversed(range(40))])[::-1]
    np.testing.assert_array_equal(starts, again)
    assert (settable.distance(starts, goals) >= max(settable.thresholds.values())).all()
    assert (settable.path_length(starts, goals) >= settable.distance(starts, goals) - 1e-5).all()
    assert len(np.unique(starts, axis=0)) > 20


def test_given_states_of_another_shape_are_refused(settable: Any) -> None:
    for name in ("states", "goals"):
        with pytest.raises(ValueError, match="expected"):
            settable.reset([0, 1], **{name: states_of(settable, 3)})


@pytest.mark.parametrize("name", [name for name in NAMES if name not in SETTABLE])
def test_states_that_cannot_be_set_are_refused(name: str, built: dict[str, Any]) -> None:
    env = built.get(name) or built.setdefault(name, build(name))
    for argument in ("states", "goals"):
        with pytest.raises(ValueError, match=f"{argument} cannot be set"):
            env.reset([0], **{argument: np.zeros((1, len(env.state_names)))})


def test_every_environment_says_in_its_first_line_what_it_is() -> None:
    assert NAMES
    assert all((Path(conf_folder()) / "env" / f"{name}.yaml").read_text().startswith("# ") for name in NAMES)
