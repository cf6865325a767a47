"""Environments of gymnasium: what is refused, what ends, and what their frames and states are."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jepa.envs import gym
from jepa.envs.gym import GymEnv, to_frame
from jepa.envs.types import stored_node
from jepa.errors import FileError

gymnasium = pytest.importorskip("gymnasium")
spaces = gymnasium.spaces


class Counter(gymnasium.Env):
    """Counts its steps; ends after `length` of them, and refuses to be stepped after that."""

    metadata = {"render_modes": ["rgb_array"]}

    def __init__(self, action_space: Any = None, length: int = 3, render_mode: str | None = None, pixels: Any = None):
        self.render_mode, self.length, self.pixels = render_mode, length, pixels
        self.action_space = action_space or spaces.Discrete(2, start=5)
        self.observation_space = spaces.Box(0, 99, (1,))
        self.resets = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count, self.resets, self.actions = 0, self.resets + 1, []
        return np.array([self.count]), {}

    def step(self, action):
        assert self.count < self.length, "stepped after its end"
        self.count += 1
        self.actions.append(action)
        return np.array([self.count]), 1.0, self.count == self.length, False, {}

    def render(self):
        return self.pixels if self.pixels is not None else np.full((8, 8, 3), self.count, dtype=np.uint8)


class Blind(Counter):
    metadata = {"render_modes": ["ansi"]}


@pytest.fixture(autouse=True)
def _registered():
    gymnasium.register("test/Counter-v0", Counter)
    gymnasium.register("test/Blind-v0", Blind)
    yield
    del gymnasium.registry["test/Counter-v0"], gymnasium.registry["test/Blind-v0"]


def counter(**kwargs: Any) -> GymEnv:
    options = {name: kwargs.pop(name) for name in ("size", "channels", "frame_skip", "max_steps") if name in kwargs}
    return GymEnv(**{"id": "test/Counter-v0", "kwargs": kwargs, "size": 8} | options)


def test_an_environment_that_has_ended_keeps_its_last_frame_and_is_not_reset() -> None:
    env = counter()
    env.reset([0, 1])
    resets = [inner.unwrapped.resets for inner in env.envs]
    results = [env.step(np.zeros(2)) for _ in range(5)]
    assert [result.terminated.tolist() for result in results] == [
        [False] * 2,
        [False] * 2,
        [True] * 2,
        *[[False] * 2] * 2,
    ]
    assert [int(result.frames[0, 0, 0, 0]) for result in results] == [1, 2, 3, 3, 3]
    assert [float(result.states[0, 0]) for result in results] == [1, 2, 3, 3, 3]
    assert [float(result.rewards[0]) for result in results] == [1, 1, 1, 0, 0]
    assert [inner.unwrapped.resets for inner in env.envs] == resets


def test_a_transition_repeats_the_action_and_ends_where_the_episode_does() -> None:
    env = counter(frame_skip=2)
    env.reset([0])
    results = [env.step(np.zeros(1)) for _ in range(2)]
    assert [float(result.rewards[0]) for result in results] == [2, 1]
    assert [bool(result.terminated[0]) for result in results] == [False, True]


def test_the_limit_counts_transitions_and_truncates() -> None:
    env = counter(max_steps=2, frame_skip=3, length=99)
    env.reset([0])
    results = [env.step(np.zeros(1)) for _ in range(2)]
    assert [(bool(result.terminated[0]), bool(result.truncated[0])) for result in results] == [
        (False, False),
        (False, True),
    ]


@pytest.mark.parametrize("mode", [*gymnasium.vector.AutoresetMode, None])
def test_an_environment_that_resets_itself_is_refused(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the first frame of an episode would be stored as the outcome of the last action of the one before."""
    if mode is not None:
        monkeypatch.setitem(Counter.metadata, "autoreset_mode", mode)
    wrap = gymnasium.wrappers.Autoreset if mode is None else lambda env: env
    gymnasium.register("Selfreset-v0", lambda **settings: wrap(Counter(**settings)))
    try:
        if mode is gymnasium.vector.AutoresetMode.DISABLED:
            assert GymEnv(id="Selfreset-v0").actions.num_actions == 2
            return
        with pytest.raises(ValueError, match="Selfreset-v0 resets itself at the end of an episode"):
            GymEnv(id="Selfreset-v0")
    finally:
        del gymnasium.registry["Selfreset-v0"]


def test_discrete_actions_begin_at_the_start_of_the_space() -> None:
    env = counter()
    env.reset([0])
    env.step(np.array([0])), env.step(np.array([1]))
    assert env.envs[0].unwrapped.actions == [5, 6]


def test_environments_are_made_once_and_kept() -> None:
    env = counter()
    env.reset([0])
    first = env.envs[0]
    env.reset([0, 1, 2])
    env.reset([0])
    assert len(env.envs) == 3
    assert env.envs[0] is first


def test_a_frame_is_the_mean_over_the_area_of_each_pixel() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, size=(12, 8, 3), dtype=np.uint8)
    means = pixels.reshape(4, 3, 4, 2, 3).mean(axis=(1, 3)).transpose(2, 0, 1)
    np.testing.assert_allclose(to_frame(pixels, (3, 4, 4)), means, atol=1)
    np.testing.assert_array_equal(to_frame(pixels[:8], (3, 8, 8)), pixels[:8].transpose(2, 0, 1))
    grey = to_frame(np.full((8, 8, 3), 77, dtype=np.uint8), (1, 4, 4))
    np.testing.assert_array_equal(grey, np.full((1, 4, 4), 77))


def test_states_are_small_observations() -> None:
    assert GymEnv(id="CartPole-v1").state_names == tuple(f"observation/{n}" for n in range(4))
    assert GymEnv(id="jepa/TwoRooms-v0").state_names == ()


@pytest.mark.parametrize(
    ("id", "kwargs", "expected"),
    [
        ("CartPole-v7", {}, 'did you mean "CartPole-v'),
        ("test/Blind-v0", {}, "renders no pictures"),
        ("test/Counter-v0", {"speed": 3}, "speed"),
        ("test/Counter-v0", {"render_mode": "human"}, "leave it out"),
        ("test/Counter-v0", {"action_space": spaces.MultiDiscrete([2, 3])}, "MultiDiscrete"),
        ("test/Counter-v0", {"action_space": spaces.Dict({"a": spaces.Discrete(2)})}, "Dict"),
        ("test/Counter-v0", {"action_space": spaces.Box(-np.inf, np.inf, (2,))}, "no bounds"),
        ("test/Counter-v0", {"action_space": spaces.Box(0, 1, (2, 2))}, "one dimension"),
        ("test/Counter-v0", {"action_space": spaces.Box(0, 9, (2,), dtype=np.int64)}, "cannot be used"),
        ("test/Counter-v0", {"pixels": np.zeros((8, 8), dtype=np.uint8)}, "renders uint8"),
        ("no_such_module:Env-v0", {}, "no_such_module"),
        ("ALE/Pong-v5", {}, "pip install 'jepa-train[atari]'"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(id: str, kwargs: dict[str, Any], expected: str) -> None:
    if id.startswith("ALE") and find_spec("ale_py"):
        pytest.skip("ale_py is installed")
    with pytest.raises(ValueError, match=expected) as refusal:
        GymEnv(id=id, kwargs=kwargs)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("id", ["MiniGrid-Empty-Random-5x5-v0", "MiniGrid-DoorKey-5x5-v0", "CartPole-v1"])
def test_the_environments_of_the_presets_keep_the_rules_of_gymnasium(id: str) -> None:
    if id.startswith("MiniGrid"):
        pytest.importorskip("minigrid")
    from gymnasium.utils.env_checker import check_env

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_env(GymEnv(id=id).envs[0].unwrapped, skip_render_check=True)


@pytest.mark.parametrize("package", ["gymnasium", "minigrid"])
def test_a_missing_extra_is_named_with_the_line_of_pip(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    original = gym.import_module
    monkeypatch.setattr(gym, "import_module", lambda name: without(name) if name == package else original(name))
    with pytest.raises(ValueError, match=r"needs the package .*pip install 'jepa-train\[envs\]'"):
        GymEnv(id="MiniGrid-Empty-5x5-v0")


def test_a_typed_id_may_import_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "import gymnasium; gymnasium.register('test/Mine-v0', gymnasium.spec('test/Counter-v0').entry_point)"
    (tmp_path / "module_of_mine.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    assert GymEnv(id="module_of_mine:test/Mine-v0", size=8).actions.num_actions == 2
    del gymnasium.registry["test/Mine-v0"]


@pytest.mark.parametrize(
    "node",
    [
        {"_target_": "jepa.envs.gym.GymEnv", "id": "os:CartPole-v1"},
        {"_target_": "os.system", "command": "true"},
        {"_target_": "jepa.envs.gym.import_module", "name": "os"},
        {"_target_": "jepa.envs.gym.GymEnv", "id": "CartPole-v1", "kwargs": {"x": {"_target_": "os.system"}}},
        {"_target_": "jepa.envs.gym.GymEnv", "id": "${oc.env:HOME}"},
        {},
    ],
)
def test_a_file_may_not_name_code(node: dict[str, Any]) -> None:
    with pytest.raises(FileError, match=r"store\.json"):
        stored_node(node, Path("store.json"))


def test_a_file_may_name_an_environment() -> None:
    node = {"_target_": "jepa.envs.gym.GymEnv", "id": "CartPole-v1", "kwargs": {}}
    assert stored_node(node, Path("store.json")) == node
