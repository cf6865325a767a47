"""PPO of Stable-Baselines3 on our environments, and our encoders as its features extractor."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from corridor import Corridor
from gymnasium import Env, spaces
from stable_baselines3 import PPO
from tiny_agent import agent

import jepa.rl
from jepa import load_encoder
from jepa.data.collect import rollouts
from jepa.envs.policies import Random
from jepa.errors import RunError
from jepa.rl.baselines import FrameEnv, enlarged, ppo_policy
from jepa.rl.features import FeaturesExtractor

NODE = {"_target_": "corridor.Corridor"}


def actions_of(policy: Any, env: Any, num_steps: int = 6) -> list[list[float]]:
    return [episode.actions.tolist() for episode in rollouts(env, policy, range(8), num_steps)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose encoder sees frames of three channels."""
    folder = tmp_path_factory.mktemp("run") / "run"
    agent(folder, "steps=1", "eval_every=null", "evaluator=[]").train()
    return folder


def test_ppo_learns_the_way_through_a_corridor() -> None:
    policy = ppo_policy(NODE, steps=1536, seed=0, episode_steps=12)
    found, by_chance = (
        np.mean([episode.rewards.sum() for episode in rollouts(Corridor(limit=5), one, range(60), 5)])
        for one in (policy, Random())
    )
    assert found > 0.8 > 0.5 > by_chance


def test_the_same_seed_gives_the_same_policy_and_another_seed_another() -> None:
    first, again, other = (ppo_policy(NODE, steps=64, seed=seed, episode_steps=12) for seed in (0, 0, 1))
    weights = [next(policy.model.policy.parameters()) for policy in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert actions_of(first, Corridor()) == actions_of(again, Corridor())


def test_an_action_depends_on_its_own_episode_alone() -> None:
    policy = ppo_policy(NODE, steps=64, seed=0, episode_steps=12)
    together = actions_of(policy, Corridor())
    alone = [rollouts(Corridor(), policy, [seed], 6)[0].actions.tolist() for seed in range(8)]
    assert together == alone
    assert len({tuple(actions) for actions in together}) > 1


@pytest.mark.parametrize("steps", [300, 701])
def test_ppo_takes_exactly_the_steps_that_it_is_given(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, step = [], Corridor.step
    monkeypatch.setattr(Corridor, "step", lambda self, actions: calls.append(len(actions)) or step(self, actions))
    ppo_policy(NODE, steps=steps, seed=0, episode_steps=12)
    assert sum(calls) == steps


def test_continuous_actions_are_between_their_bounds_and_reach_both() -> None:
    env = Corridor(continuous=True)
    policy = ppo_policy(NODE | {"continuous": True}, steps=64, seed=0, episode_steps=12)
    actions = np.concatenate([episode.actions for episode in rollouts(env, policy, range(40), 12)])
    assert (actions.min(), actions.max()) == (-2, 2)
    wrapped = FrameEnv(env, seed=0, episode_steps=12)
    assert (wrapped.action_space.low, wrapped.action_space.high) == (-1, 1)


def test_an_episode_is_cut_at_its_number_of_steps() -> None:
    env = FrameEnv(Corridor(limit=12), seed=0, episode_steps=3)
    env.reset()
    assert [env.step(np.int64(2))[2:4] for _ in range(3)] == [(False, False), (False, False), (False, True)]


def test_episodes_begin_as_their_number_says() -> None:
    starts = [
        [env.reset()[0].tolist() for _ in range(6)] for env in (wrapped(seed=0), wrapped(seed=0), wrapped(seed=1))
    ]
    assert starts[0] == starts[1] != starts[2]
    assert starts[0][0] != starts[0][1] or starts[0][1] != starts[0][2]


def wrapped(seed: int) -> FrameEnv:
    return FrameEnv(Corridor(), seed=seed, episode_steps=12)


def test_small_frames_are_enlarged_for_the_convolutions() -> None:
    policy = ppo_policy(NODE, steps=16, seed=0, episode_steps=12)
    assert policy.model.observation_space.shape == (1, 40, 40)
    frames = np.arange(8, dtype=np.uint8).reshape(1, 2, 2, 2)
    assert enlarged(frames, 3).shape == (1, 2, 6, 6)
    assert np.array_equal(enlarged(frames, 3)[..., ::3, ::3], frames)


def frames_of(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randint(0, 256, (4, *shape), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.mark.parametrize("pooling", ["mean", "flatten"])
@pytest.mark.parametrize("shape", [(3, 40, 50), (40, 50, 3)], ids=["CHW", "HWC"])
def test_features_are_those_of_the_encoder(shape: tuple[int, ...], pooling: Any, run: Path) -> None:
    extractor = jepa.rl.FeaturesExtractor(spaces.Box(0, 255, shape, np.uint8), run, pooling)
    frames = frames_of(shape)
    encoder: Any = load_encoder(run)
    tokens = encoder(encoder.transform(frames if shape[0] == 3 else frames.permute(0, 3, 1, 2)))
    expected = tokens.mean(dim=1) if pooling == "mean" else tokens.flatten(1)
    found = extractor(frames.float() / 255)
    assert torch.equal(found, expected)
    assert found.shape[1] == extractor.features_dim


class Pictures(Env):
    """Noise of [H, W, C], as most environments of others give it."""

    observation_space = spaces.Box(0, 255, (32, 32, 3), np.uint8)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        self.random = np.random.default_rng(seed)
        return self.observation_space.low + 9, {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        frame = self.random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        return frame, float(action), self.random.random() < 0.2, False, {}


def with_encoder(run: Path, **options: Any) -> PPO:
    features = {"features_extractor_class": FeaturesExtractor, "features_extractor_kwargs": {"encoder": run}}
    return PPO("CnnPolicy", Pictures(), n_steps=16, batch_size=16, seed=0, policy_kwargs=features | options)


def test_learning_changes_the_policy_and_never_the_encoder(run: Path, tmp_path: Path) -> None:
    model, before = with_encoder(run), load_encoder(run).state_dict()
    weights = model.policy.action_net.weight.clone()
    model.learn(32)
    assert not torch.equal(model.policy.action_net.weight, weights)
    after = model.policy.features_extractor.encoder.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not any(module.training for module in model.policy.features_extractor.encoder.modules())
    model.save(tmp_path / "model.zip")
    loaded = PPO.load(tmp_path / "model.zip")
    frames = frames_of((3, 32, 32)).numpy()
    values = [one.policy.predict_values(one.policy.obs_to_tensor(frames)[0]) for one in (model, loaded)]
    assert torch.equal(*values)


def test_ppo_acts_on_the_features_of_a_run(run: Path) -> None:
    node = {"_target_": "jepa.envs.two_rooms.TwoRooms", "channels": 3}
    policy = ppo_policy(node, steps=16, seed=0, episode_steps=8, encoder=run)
    assert policy.model.policy.features_extractor.features_dim == 16 * load_encoder(run).embed_dim
    assert policy.model.observation_space.shape == (3, 64, 64)


def test_observations_that_are_no_frames_are_refused_in_a_sentence(run: Path) -> None:
    frame = spaces.Box(0, 255, (3, 32, 32), np.uint8)
    with pytest.raises(ValueError, match="a dict of direction, image: keep the frames alone by a wrapper"):
        FeaturesExtractor(spaces.Dict({"image": frame, "direction": spaces.Discrete(4)}), run)
    with pytest.raises(ValueError, match="takes uint8 frames"):
        FeaturesExtractor(spaces.Box(0, 1, (3, 32, 32), np.float32), run)
    with pytest.raises(ValueError, match="pooling='max'; valid: mean, flatten"):
        FeaturesExtractor(frame, run, "max")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="leave out normalize_images=False"):
        with_encoder(run, normalize_images=False).learn(16)


def test_a_missing_package_is_named_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("stable_baselines3")]:
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("jepa.rl.features", "jepa.rl.baselines"):
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(RunError, match=r"stable_baselines3\S* is not installed: pip install 'jepa-train\[rl\]'"):
        _ = jepa.rl.FeaturesExtractor
