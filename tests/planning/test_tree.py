"""The tree of imagined steps: shortest ways, none through walls, none twice into what failed, one episode by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from tiny_world import PIXELS, make_world
from torch import Tensor

from jepa.agent import load_planner
from jepa.envs.two_rooms import MAX_STEP, TwoRooms
from jepa.planning.control import Goals, Planning
from jepa.planning.costs import MetricDistance
from jepa.planning.steps import choices_of
from jepa.planning.tree import Tree
from jepa.planning.types import Moments, Search
from jepa.types import ActionSpace

Dynamics = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""states [n, S], actions [n, 2] in pixels -> states [n, S]"""
STEP = 2.3
"""Median length of a random step, in pixels."""


class Simulated:
    """Steps of one episode of two rooms, by any dynamics of its states; places are positions in median steps."""

    choices = choices_of(PIXELS, 1)

    def __init__(
        self, dynamics: Dynamics, goal: np.ndarray, seen: Sequence[np.ndarray], done: Sequence[Tensor]
    ) -> None:
        self.dynamics, self.goal, self.done = dynamics, torch.tensor(goal[:2]) / STEP, done
        self.past = Moments(torch.tensor(np.stack(seen))[:, None, None], torch.zeros(len(seen), 0, 2))

    def step(self, moments: Moments, actions: Tensor) -> Moments:
        states = self.dynamics(moments.states[:, 0, 0].numpy(), MAX_STEP * actions.numpy())
        return Moments(torch.from_numpy(states)[:, None, None], moments.actions)

    def places(self, moments: Moments) -> Tensor:
        return moments.states[:, 0, 0, :2] / STEP

    def costs_of(self, moments: Moments, actions: Tensor, following: Moments) -> Tensor:
        return (self.places(following) - self.goal).norm(dim=1)


def plan_of(tree: Tree, steps: Any, num_actions: int = 0) -> Tensor:
    size = steps.choices.shape[1]
    return tree(Search(lambda plans: plans, tree.horizon, size, num_actions, [torch.Generator()], None, [steps]))[0]


def solved(tree: Tree, dynamics: Dynamics | None, seed: int, budget: int = 60) -> int:
    """The steps that an episode with random walls takes, `budget` if it is not solved; None takes its own dynamics."""
    env = TwoRooms(walls="random")
    task = env.task(seed)
    env.reset([0], task.start[None], task.goal[None])
    seen, done, plan = [env.states[0]], [], torch.empty(0)
    for step in range(budget):
        if step % tree.execute == 0:
            plan = plan_of(tree, Simulated(dynamics or env.simulate, task.goal, seen, done))
        done.append(plan[step % tree.execute])
        after = env.step(MAX_STEP * done[-1][None].numpy())
        if after.terminated[0]:
            return step + 1
        seen.append(after.states[0])
    return budget


@pytest.mark.parametrize("seed", range(20_000, 20_010))
def test_with_true_dynamics_rooms_with_random_walls_are_solved(seed: int) -> None:
    env = TwoRooms(walls="random")
    task = env.task(seed)
    way = env.path_length(task.start[None], task.goal[None])[0] / MAX_STEP
    assert solved(Tree(), None, seed) <= way + 4


def leaky(states: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """As the rooms, but the wall lets everything through in two places, beside the door and above it."""
    moved = states.copy()
    moved[:, :2] = np.clip(moved[:, :2] + actions, 3, 61)
    passes = np.abs(np.abs(states[:, 1] - states[:, 3]) - 14) < 4
    return np.where(passes[:, None], moved, TwoRooms().simulate(states, actions))


def test_short_cuts_that_failed_are_left_out() -> None:
    seeds = range(20_000, 20_010)
    remembering, forgetful = ([solved(tree, leaky, seed) for seed in seeds] for tree in (Tree(), Tree(surprise=1e6)))
    assert sum(steps < 60 for steps in remembering) == 10
    assert sum(remembering) < sum(forgetful) - 40


def corridor(now: float, goal: float, **options: Any) -> Simulated:
    """Nothing in the way: a start and a goal on a line of y = 32."""
    free = lambda states, actions: np.pad(actions, ((0, 0), (0, 2))) + states  # noqa: E731
    start, end = np.array([[now, 32, 200, 32], [goal, 32, 200, 32]], dtype=np.float32)
    return Simulated(free, end, options.get("seen", [start]), options.get("done", []))


def test_a_plan_is_a_shortest_way_and_ends_at_the_goal_with_a_part_of_a_step() -> None:
    plan = plan_of(Tree(radius=0.5, tolerance=0.5), corridor(10, 25))
    assert plan[:4].tolist() == [[1, 0], [1, 0], [1, 0], [0.75, 0]]
    assert not plan[4:].any()


def test_a_goal_that_no_way_leads_to_is_approached() -> None:
    steps = corridor(10, 50)
    free = steps.dynamics
    steps.dynamics = lambda states, actions: np.clip(free(states, actions), 0, np.float32([30, 64, 200, 32]))
    plan = plan_of(Tree(), steps)
    assert 10 + MAX_STEP * plan[:, 0].sum() == 30


def test_the_rest_of_a_plan_is_kept_while_it_leads_near_the_goal_and_not_when_it_does_not() -> None:
    tree, steps = Tree(), corridor(10, 50)
    detour = torch.zeros(1, tree.horizon, 2)
    detour[0, :14] = torch.tensor([[0.0, 1.0]] * 2 + [[1.0, 0.0]] * 10 + [[0.0, -1.0]] * 2)
    search = Search(lambda plans: plans, tree.horizon, 2, 0, [torch.Generator()], detour, [steps])
    assert torch.equal(tree(search), detour)
    astray = detour.clone()
    astray[0, :14, 0] = 0
    assert not torch.equal(tree(search._replace(warm_start=astray)), astray)
    short = torch.zeros_like(detour)
    short[0, 0, 0] = 1  # it ends one step before the goal, within the drift
    assert tree(search._replace(warm_start=short, steps=[corridor(42, 50)]))[0, :2].tolist() == [[1, 0], [1, 0]]


def test_a_step_is_not_made_a_third_time() -> None:
    """The first two led there and back."""
    places = [np.array([x, 32, 200, 32], dtype=np.float32) for x in (10, 14, 10, 14, 10)]
    done = [torch.tensor([sign, 0.0]) for sign in (1, -1, 1, -1)]
    assert plan_of(Tree(), corridor(10, 50))[0].tolist() == [1, 0]
    assert plan_of(Tree(), corridor(10, 50, seen=places[:3], done=done[:2]))[0].tolist() == [1, 0]
    assert plan_of(Tree(), corridor(10, 50, seen=places, done=done))[0].tolist() != [1, 0]


def test_what_was_tried_is_forgotten_if_nothing_else_leads_to_the_goal() -> None:
    start, behind = (np.array([x, 32, 200, 32], dtype=np.float32) for x in (10, 6))
    steps = corridor(10, 50, seen=[start, behind, start], done=[torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0])])
    everywhere = plan_of(Tree(detour=100), steps)
    assert everywhere[0].tolist() == [1, 0]


@pytest.mark.parametrize(("size", "count"), [(1, 2), (2, 8), (3, 18)])
@pytest.mark.parametrize("block", [1, 3])
def test_choices_are_full_steps_along_axes_and_diagonals_or_all_discrete_actions(
    size: int, count: int, block: int
) -> None:
    choices = choices_of(ActionSpace(low=(-1.0,) * size, high=(1.0,) * size), block)
    assert choices.shape == (count, block * size)
    assert len({tuple(choice) for choice in choices.tolist()}) == count
    assert (choices.abs().amax(dim=1) == 1).all()
    assert torch.equal(choices, choices[:, :size].repeat(1, block))
    assert choices_of(ActionSpace(num_actions=4), block).tolist() == [[action] * block for action in range(4)]


@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize("history", [1, 3])
@pytest.mark.parametrize("space", [PIXELS, ActionSpace(num_actions=4)], ids=["continuous", "discrete"])
def test_steps_are_those_of_the_world_after_what_was_seen_and_done(
    space: ActionSpace, history: int, block: int
) -> None:
    world = make_world(space, history=history, block=block, side=16, heads={"metric": 3})
    control = Planning(world, Tree(horizon=3, execute=2, radius=1e-3), {"metric": MetricDistance()})
    frames = np.random.default_rng(0).integers(0, 255, (4 * block, 2, 1, 16, 16), dtype=np.uint8)
    control.begin(Goals(frames[-1], np.zeros((2, 2))), range(2), 9)
    for step in range(3 * block + 1):
        control.act(step, frames[step], np.zeros((2, 2)), np.ones(2, dtype=bool))
    control.done.pop()  # it was done after the steps that are looked at
    steps = list(control._steps(np.array([False, True])))
    assert steps[0] is None
    assert steps[1] is not None
    past, actions = steps[1].past, steps[1].choices
    assert past.states.shape[:2] == (4, history)
    assert [done.tolist() for done in steps[1].done] == [done[1].tolist() for done in control.done]
    for time in range(4):
        torch.testing.assert_close(past.states[time, -1], world.encode(frames[time * block])[1], rtol=1e-4, atol=1e-5)
    before = Moments(*(part[-1:].expand(len(actions), *part.shape[1:]) for part in past))
    twice = steps[1].step(steps[1].step(before, actions), actions.flip(0))
    acted = torch.cat([before.actions, actions[:, None], actions.flip(0)[:, None]], dim=1)
    expected = world.rollout(before.states, world.unscale(acted))[:, -1]
    torch.testing.assert_close(twice.states[:, -1], expected)
    torch.testing.assert_close(steps[1].places(twice), world.heads["metric"](expected.flatten(1)))


def test_the_cost_of_a_tree_is_the_metric_unless_another_is_named() -> None:
    assert list(load_planner("tree").costs) == ["metric_distance"]
    assert list(load_planner("tree", "latent_l2").costs) == ["latent_l2"]
    assert list(load_planner().costs) == ["gc_value"]


def test_a_world_without_a_metric_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no head metric; add it to objective.heads"):
        Planning(make_world(side=16), Tree(), {})
