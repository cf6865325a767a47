"""Planners: each solves what has a known optimum, keeps the bounds and plans the same in any batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from jepa.config import factory
from jepa.config.catalogue import conf_folder
from jepa.envs.two_rooms import TwoRooms
from jepa.envs.types import EnvTraits
from jepa.planning.cem import CEM
from jepa.planning.control import TruePlanning
from jepa.planning.icem import ICEM
from jepa.planning.protocol import make_tasks, play
from jepa.planning.sampling import best, coloured, normal, uniform
from jepa.planning.types import PlannerTraits, Search

NAMES = sorted(path.stem for path in (conf_folder() / "planner").glob("*.yaml"))
SEARCHING = [name for name in NAMES if name not in ("policy", "tree")]  # the tree is tested in test_tree.py
H, A, NUM_ACTIONS = 6, 2, 4


def make(name: str, **changes: Any) -> Any:
    node = OmegaConf.to_container(OmegaConf.load(conf_folder() / "planner" / f"{name}.yaml"))
    assert isinstance(node, dict)
    return factory({**node, **changes})()


def generators(count: int, first: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(first + number) for number in range(count)]


def is_discrete(planner: Any) -> bool:
    return PlannerTraits.of(planner).is_discrete


def optimum(planner: Any, count: int) -> Tensor:
    """A constant plan for each episode, so that planners that hold their actions can reach it."""
    random = torch.Generator().manual_seed(7)
    if is_discrete(planner):
        return torch.randint(NUM_ACTIONS, (count, H, A), generator=random)
    return (1.6 * torch.rand(count, 1, A, generator=random) - 0.8).expand(-1, H, -1)


def distance_to(goal: Tensor) -> Callable[[Tensor], Tensor]:
    """The squared distance from the goal; of discrete actions the number that differ."""

    def cost(candidates: Tensor) -> Tensor:
        goals = goal[:, None]
        if candidates.dtype == torch.int64:
            return (candidates != goals).float().sum(dim=(2, 3))
        return (candidates - goals).square().sum(dim=(2, 3))

    return cost


def search(planner: Any, cost: Callable[[Tensor], Tensor], count: int, warm_start: Tensor | None = None) -> Search:
    num_actions = NUM_ACTIONS if is_discrete(planner) else 0
    return Search(cost, H, A, num_actions, generators(count), warm_start)


@pytest.mark.parametrize("name", SEARCHING)
def test_a_quadratic_is_solved(name: str) -> None:
    planner = make(name, horizon=H)
    goal = optimum(planner, 5)
    plan = planner(search(planner, distance_to(goal), 5))
    assert plan.shape == (5, H, A)
    if is_discrete(planner):
        assert plan.dtype == torch.int64
        assert (plan != goal).float().mean() <= 0.1
        return
    # a random plan is 0.55 away on average
    assert (plan - goal).abs().mean() < (0.3 if name == "random_shooting" else 0.15)


@pytest.mark.parametrize("name", SEARCHING)
def test_a_plan_is_the_same_bit_for_bit_in_any_batch(name: str) -> None:
    planner = make(name, horizon=H)
    goal = optimum(planner, 100)
    everything = planner(search(planner, distance_to(goal), 100))
    for first, count in ((0, 1), (57, 1), (16, 8)):
        part = goal[first : first + count]
        task = search(planner, distance_to(part), count)._replace(generators=generators(count, first))
        assert torch.equal(planner(task), everything[first : first + count])


@pytest.mark.parametrize("name", SEARCHING)
def test_all_candidates_and_plans_keep_the_bounds(name: str) -> None:
    planner, seen = make(name, horizon=H), []

    def cost(candidates: Tensor) -> Tensor:
        """Lower and lower beyond the bounds."""
        seen.append(candidates.detach())
        return -candidates.float().sum(dim=(2, 3))

    plan = planner(search(planner, cost, 3))
    low, high = (0, NUM_ACTIONS - 1) if is_discrete(planner) else (-1, 1)
    for values in (*seen, plan):
        assert low <= values.min()
        assert values.max() <= high
    assert plan.float().mean() > 0.7 * high


@pytest.mark.parametrize("name", SEARCHING)
def test_a_warm_start_is_a_candidate_that_is_kept_if_nothing_is_better(name: str) -> None:
    planner = make(name, horizon=H)
    goal = optimum(planner, 4)
    first_seen: list[Tensor] = []
    cost = distance_to(goal)

    def recording(candidates: Tensor) -> Tensor:
        first_seen.append(candidates.detach().clone())
        return 1e4 * cost(candidates)

    plan = planner(search(planner, recording, 4, warm_start=goal.clone()))
    candidates = first_seen[0].flatten(2)
    assert (candidates == goal.flatten(1)[:, None]).all(dim=2).any(dim=1).all()
    if name in ("cem", "mppi"):  # the means of their last distributions
        assert cost(plan[:, None]).mean() < 0.1
    else:
        assert torch.equal(plan, goal)


def test_the_policy_planner_returns_the_actions_of_the_policy() -> None:
    plan = torch.rand(3, 1, A)
    planner = make("policy")
    assert PlannerTraits.of(planner).warm_start == "policy"
    assert torch.equal(planner(search(planner, distance_to(plan), 3, warm_start=plan)), plan)


@pytest.mark.parametrize("name", ["cem", "icem", "categorical_cem"])
def test_more_elites_than_samples_are_refused_with_both(name: str) -> None:
    with pytest.raises(ValueError, match=r"planner.elites=9.*planner.samples=8"):
        make(name, elites=9, samples=8)


@pytest.mark.parametrize("name", SEARCHING)
def test_the_smallest_settings_give_finite_plans(name: str) -> None:
    least = {"samples": 2, "iterations": 1, "elites": 2, "starts": 1, "horizon": 1, "execute": 1}
    node = OmegaConf.load(conf_folder() / "planner" / f"{name}.yaml")
    changes = {key: value for key, value in least.items() if key in node}
    planner = make(name, **changes | ({"samples": 1} if name == "mppi" else {}))
    goal = optimum(planner, 2)[:, :1]
    plan = planner(search(planner, distance_to(goal), 2)._replace(horizon=1))
    assert plan.shape == (2, 1, A)
    assert plan.float().isfinite().all()


def test_icem_returns_the_best_candidate_of_all_iterations() -> None:
    costs: list[Tensor] = []
    planner = ICEM(horizon=H)
    goal = optimum(planner, 3)
    cost = distance_to(goal)

    def recording(candidates: Tensor) -> Tensor:
        costs.append(cost(candidates))
        return costs[-1]

    plan = planner(search(planner, recording, 3))
    torch.testing.assert_close(cost(plan[:, None])[:, 0], torch.cat(costs, dim=1).amin(dim=1))


def recorded(planner: Any) -> list[Tensor]:
    """The candidates of each iteration on a quadratic, for one episode: [N, H, A]."""
    seen, cost = [], distance_to(optimum(planner, 1))

    def recording(candidates: Tensor) -> Tensor:
        seen.append(candidates.detach()[0].clone())
        return cost(candidates)

    planner(search(planner, recording, 1))
    return seen


@pytest.mark.parametrize("name", ["cem", "icem"])
def test_one_elite_is_refused_since_it_has_no_deviation(name: str) -> None:
    with pytest.raises(ValueError, match="elites=1: must be at least 2"):
        make(name, elites=1)
    assert make(name, elites=2, samples=2)


def test_cem_keeps_a_least_deviation() -> None:
    last = recorded(make("cem", horizon=H, iterations=20, min_std=0.2))[-1]
    assert 0.15 < last[1:].std(dim=0).mean() < 0.25
    assert recorded(make("cem", horizon=H, iterations=20, min_std=0.0))[-1].std(dim=0).mean() < 0.01


def test_icem_draws_fewer_candidates_each_time_and_at_least_twice_the_elites() -> None:
    seen = recorded(make("icem", horizon=H, samples=64, elites=10, decay=2.0, keep=0.3, iterations=4))
    drawn = [
        len(seen[0]) - 2,
        *(len(candidates) - 3 - 1 for candidates in seen[1:]),
    ]  # with the mean and 3 that are kept
    assert drawn == [64, 32, 20, 20]


def test_mppi_shrinks_its_noise() -> None:
    seen = recorded(make("mppi", horizon=H, std=0.01, shrink=0.5, iterations=3))
    spreads = [candidates[1:].std(dim=0).mean().item() for candidates in seen]
    assert spreads == pytest.approx([0.01, 0.005, 0.0025], rel=0.1)


def test_gradient_judges_the_plan_of_its_last_step() -> None:
    planner = make("gradient", horizon=H, starts=1, iterations=1, lr=0.1)
    goal = optimum(planner, 1)
    plan = planner(search(planner, distance_to(goal), 1))
    assert torch.allclose(plan, 0.1 * goal.sign(), atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 7, 16])
@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
def test_coloured_noise_has_unit_variance(beta: float, steps: int) -> None:
    noise = coloured(generators(2), beta, 20_000, steps, 2)
    assert noise.shape == (2, 20_000, steps, 2)
    assert noise.mean().abs() < 0.02
    torch.testing.assert_close(noise.std(dim=(0, 1, 3)), torch.ones(steps), atol=0.03, rtol=0)


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
def test_the_power_of_coloured_noise_falls_with_the_frequency(beta: float) -> None:
    noise = coloured(generators(1), beta, 20_000, 32, 1)
    power = torch.fft.rfft(noise, dim=-2).abs().square().mean(dim=(0, 1, 3))[1:-1]
    frequencies = torch.fft.rfftfreq(32)[1:-1]
    slope = np.polyfit(frequencies.log().numpy(), power.log().numpy(), 1)[0]
    assert abs(slope + beta) < 0.1


@pytest.mark.parametrize("draw", [normal, uniform, lambda g, *shape: coloured(g, 2.0, *shape)])
def test_numbers_of_an_episode_come_from_its_own_generator(draw: Callable) -> None:
    together = draw(generators(3), 4, 5, 2)
    for number in range(3):
        torch.testing.assert_close(draw(generators(1, number), 4, 5, 2)[0], together[number], rtol=0, atol=0)


def test_the_best_candidates_come_in_order() -> None:
    candidates = torch.arange(6.0).view(1, 6, 1, 1)
    costs = torch.tensor([[3.0, 1.0, 5.0, 0.0, 4.0, 2.0]])
    assert best(candidates, costs, 3).flatten().tolist() == [3, 1, 5]


@pytest.mark.slow
def test_cem_with_true_dynamics_and_the_length_of_the_way_solves_two_rooms() -> None:
    env = TwoRooms()
    traits = EnvTraits.of(env)
    assert traits.path_length
    controller = TruePlanning(traits, env.actions, CEM(), traits.path_length)
    played = play(env, controller, make_tasks(env, 40, 0), budget=60)
    assert sum(outcome.moderate for outcome in played.outcomes) >= 38
    assert sum(outcome.strict for outcome in played.outcomes) >= 38
