"""Policies act by the seed of the episode alone."""

from __future__ import annotations

import numpy as np
import pytest

from jepa.envs.policies import Expert, Random, StickyRandom
from jepa.envs.two_rooms import TwoRooms
from jepa.errors import ConfigError
from jepa.types import ActionSpace

BOX = ActionSpace(low=(-1.0, 0.0), high=(1.0, 5.0))
KEYS = ActionSpace(num_actions=3)


def actions_of(policy, space: ActionSpace, seeds, num_steps: int) -> np.ndarray:
    policy.begin(space, seeds, num_steps)
    return np.stack([policy.act(step, np.empty(0), np.empty(0)) for step in range(num_steps)], axis=1)


@pytest.mark.parametrize("space", [BOX, KEYS])
@pytest.mark.parametrize("policy", [Random(), StickyRandom()])
def test_actions_do_not_depend_on_the_episodes_beside(policy, space: ActionSpace) -> None:
    together = actions_of(policy, space, [4, 9, 2], 20)
    for row, seed in enumerate([4, 9, 2]):
        np.testing.assert_array_equal(together[row], actions_of(policy, space, [seed], 20)[0])
    assert (together[0] != together[1]).any()


def test_actions_are_uniform_between_the_bounds() -> None:
    actions = actions_of(Random(), BOX, range(200), 50).reshape(-1, 2)
    np.testing.assert_allclose(actions.mean(axis=0), [0, 2.5], atol=0.1)
    np.testing.assert_allclose([actions.min(axis=0), actions.max(axis=0)], [BOX.low, BOX.high], atol=0.02)
    counts = np.bincount(actions_of(Random(), KEYS, range(200), 50).ravel())
    np.testing.assert_allclose(counts / counts.sum(), 1 / 3, atol=0.02)


def test_a_sticky_action_is_repeated_with_its_probability() -> None:
    actions = actions_of(StickyRandom(keep=0.7), BOX, range(200), 50)
    assert (actions[:, 1:] == actions[:, :-1]).all(axis=2).mean() == pytest.approx(0.7, abs=0.02)


def test_the_expert_begins_at_the_tasks_and_acts_as_the_environment_says() -> None:
    env, policy = TwoRooms(), Expert()
    starts, goals = policy.tasks(env, [3, 8])
    np.testing.assert_array_equal(starts, [env.task(seed).start for seed in (3, 8)])
    policy.begin(env.actions, [3, 8], 5)
    np.testing.assert_array_equal(policy.act(0, np.empty(0), starts), env.expert(starts, goals))


def test_a_share_of_the_expert_s_actions_is_random() -> None:
    env, policy, seeds = TwoRooms(), Expert(random=0.3), range(200)
    starts, goals = policy.tasks(env, seeds)
    policy.begin(env.actions, seeds, 50)
    own = env.expert(starts, goals)
    differs = [(policy.act(step, np.empty(0), starts) != own).any(axis=1).mean() for step in range(50)]
    assert np.mean(differs) == pytest.approx(0.3, abs=0.02)


def test_an_environment_without_tasks_has_no_expert() -> None:
    class Bare:
        pass

    with pytest.raises(ConfigError, match="Bare has no tasks"):
        Expert().tasks(Bare(), [0])  # pyright: ignore[reportArgumentType]
