"""A world as a model of stable-worldmodel: with a solver that calls it as that package does, and with its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_world import PIXELS, make_world
from torch import Tensor

import jepa
from jepa.planning.control import Goals, Planning
from jepa.types import ActionSpace

SIDE = 16
CHOICES = ActionSpace(num_actions=3)


def pictures(seed: int, count: int = 2) -> Tensor:
    """uint8 [B, T, H, W, C], as its policy hands them to a solver"""
    return torch.randint(256, (count, 1, SIDE, SIDE, 1), generator=torch.Generator().manual_seed(seed)).byte()


def info(num_samples: int) -> dict[str, Any]:
    """What a solver makes of it: every entry once for each candidate."""
    entries = {"pixels": pictures(0), "goal": pictures(1), "id": torch.arange(2)}
    return {k: v[:, None].expand(len(v), num_samples, *v.shape[1:]) for k, v in entries.items()}


def costs_of_jepa_plan(world: Any, candidates: Tensor, costs: Any) -> Tensor:
    frames, goals = (pictures(seed)[:, 0].permute(0, 3, 1, 2).numpy() for seed in (0, 1))
    control = Planning(world, None, costs)  # pyright: ignore
    control.begin(Goals(goals, np.zeros((2, 0))), [0, 1], 4)
    control.seen.append(world.encode(frames))
    return control._cost(candidates, control._history(), np.ones(2, dtype=bool))


@pytest.mark.parametrize("space", [PIXELS, CHOICES], ids=["continuous", "discrete"])
def test_costs_are_those_that_jepa_plan_minimises(space: ActionSpace) -> None:
    world = make_world(space, side=SIDE, heads={"value": 1}).requires_grad_(False)
    model = jepa.worlds.as_swm(world, ["gc_value", "latent_l2"])
    if space.is_discrete:
        plans = torch.randint(3, (2, 5, 4, 1), generator=torch.Generator().manual_seed(2))
        candidates = torch.nn.functional.one_hot(plans, 3).flatten(3).float()
    else:
        plans = candidates = torch.rand(2, 5, 4, 2, generator=torch.Generator().manual_seed(2)) * 2 - 1
    costs = model.get_cost(info(5), candidates)
    assert costs.shape == (2, 5)
    torch.testing.assert_close(costs, costs_of_jepa_plan(world, plans, model.costs))


def test_pictures_are_encoded_once_for_all_iterations() -> None:
    world = make_world(side=SIDE)
    model, given = jepa.worlds.as_swm(world, "latent_l2"), info(3)
    first = model.get_cost(given, torch.zeros(2, 3, 4, 2))
    del given["pixels"], given["goal"]
    torch.testing.assert_close(model.get_cost(given, torch.zeros(2, 3, 4, 2)), first)


def test_the_last_of_several_pictures_is_seen() -> None:
    model, given = jepa.worlds.as_swm(make_world(side=SIDE), "latent_l2"), info(3)
    several = {"pixels": torch.cat([255 - given["pixels"], given["pixels"]], dim=2), "goal": given["goal"]}
    zeros = torch.zeros(2, 3, 4, 2)
    torch.testing.assert_close(model.get_cost(several, zeros), model.get_cost(given, zeros))


def test_actions_beyond_the_bounds_cost_what_those_at_the_bounds_do() -> None:
    model = jepa.worlds.as_swm(make_world(side=SIDE), ["latent_l2", "control"])
    beyond = 3 * torch.ones(2, 3, 4, 2)
    torch.testing.assert_close(model.get_cost(info(3), beyond), model.get_cost(info(3), beyond.clamp(-1, 1)))


def test_gradients_reach_the_candidates() -> None:
    candidates = torch.zeros(2, 3, 4, 2, requires_grad=True)
    jepa.worlds.as_swm(make_world(side=SIDE), "latent_l2").get_cost(info(3), candidates).sum().backward()
    assert candidates.grad is not None
    assert candidates.grad.abs().sum() > 0


def test_grey_comes_as_three_equal_channels_and_colours_are_refused() -> None:
    model, grey, colours = jepa.worlds.as_swm(make_world(side=SIDE), "latent_l2"), info(3), info(3)
    zeros = torch.zeros(2, 3, 4, 2)
    for key in ("pixels", "goal"):
        grey[key] = grey[key].expand(*grey[key].shape[:-1], 3)
        colours[key] = torch.cat([colours[key]] * 2 + [255 - colours[key]], dim=-1)
    torch.testing.assert_close(model.get_cost(grey, zeros), model.get_cost(info(3), zeros))
    with pytest.raises(ValueError, match="the world was trained on"):
        model.get_cost(colours, zeros)


def test_actions_are_scaled_to_the_bounds_and_back() -> None:
    scale = jepa.worlds.as_swm(make_world(side=SIDE), "latent_l2").process["action"]
    np.testing.assert_allclose(scale.inverse_transform(np.array([[-1.0, 0.5], [3.0, 0.0]])), [[-4, 2], [4, 0]])
    np.testing.assert_allclose(scale.transform(np.array([[-4.0, 2.0]])), [[-1, 0.5]])
    assert jepa.worlds.as_swm(make_world(CHOICES, side=SIDE), "latent_l2").process == {}


def test_what_cannot_be_handed_over_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="sees several"):
        jepa.worlds.as_swm(make_world(side=SIDE, history=2), "latent_l2")
    with pytest.raises(ValueError, match="no head value"):
        jepa.worlds.as_swm(make_world(side=SIDE))
    with pytest.raises(ValueError, match="did you mean"):
        jepa.worlds.as_swm(make_world(side=SIDE), "latent_l3")


@pytest.mark.slow
def test_the_solvers_of_stable_worldmodel_minimise_the_cost() -> None:
    pytest.importorskip("stable_worldmodel")
    from gymnasium.spaces import Box  # pyright: ignore
    from stable_worldmodel.policy import PlanConfig  # pyright: ignore
    from stable_worldmodel.solver import CEMSolver, GradientSolver  # pyright: ignore

    model = jepa.worlds.as_swm(make_world(side=SIDE).requires_grad_(False), "latent_l2")
    entries = {"pixels": pictures(0), "goal": pictures(1)}
    idle = model.get_cost(info(1), torch.zeros(2, 1, 4, 2))[:, 0]
    for solver in (CEMSolver(model, num_samples=64, n_steps=5, topk=8), GradientSolver(model, n_steps=5)):
        solver.configure(action_space=Box(-4, 4, (2, 2)), n_envs=2, config=PlanConfig(horizon=4, receding_horizon=2))
        plans = solver.solve(dict(entries))["actions"]
        assert plans.shape == (2, 4, 2)
        assert (model.get_cost(info(1), plans[:, None])[:, 0] < idle).all()
