"""Planning in programs of one's own: the actions of jepa-plan, from pictures of either layout."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tiny_world import PIXELS, make_world

from jepa.planning.categorical_cem import CategoricalCEM
from jepa.planning.cem import CEM
from jepa.planning.control import Goals, Planning
from jepa.planning.costs import GCValue
from jepa.planning.goal_planner import GoalPlanner
from jepa.planning.types import Planner
from jepa.types import ActionSpace

DISCRETE = ActionSpace(num_actions=3)
SIDE, STEPS = 16, 7
COSTS = {"value": GCValue()}
BLANK = np.zeros((1, SIDE, SIDE), dtype=np.uint8)


def world_of(space: ActionSpace = PIXELS, **options: Any) -> Any:
    return make_world(space, side=SIDE, heads={"value": 1}, **options)


def planner_of(space: ActionSpace = PIXELS) -> Planner:
    sizes = {"samples": 8, "iterations": 2, "elites": 4, "horizon": 3, "execute": 2}
    return CategoricalCEM(**sizes) if space.is_discrete else CEM(**sizes)


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (1, SIDE, SIDE), dtype=np.uint8)


def acted(planner: GoalPlanner, world: Any) -> list[np.ndarray]:
    planner.reset(world, picture(99))
    return [planner.act(picture(step)) for step in range(STEPS)]


@pytest.mark.parametrize("space", [PIXELS, DISCRETE], ids=["continuous", "discrete"])
@pytest.mark.parametrize(("history", "block"), [(1, 1), (3, 1), (2, 2)])
def test_it_acts_as_jepa_plan_does(history: int, block: int, space: ActionSpace) -> None:
    world = world_of(space, history=history, block=block)
    control = Planning(world, planner_of(space), COSTS, seed=4)
    control.begin(Goals(picture(99)[None], np.zeros((1, 0))), [0], STEPS)
    active = np.ones(1, dtype=bool)
    expected = [control.act(step, picture(step)[None], np.zeros((1, 0)), active)[0] for step in range(STEPS)]
    found = acted(GoalPlanner(planner_of(space), COSTS, seed=4), world)
    np.testing.assert_array_equal(np.stack(found), np.stack(expected))
    assert np.shape(found[0]) == space.shape


def test_a_reset_forgets_the_episode() -> None:
    planner, world = GoalPlanner(planner_of(), COSTS), world_of(history=2)
    np.testing.assert_array_equal(acted(planner, world), acted(planner, world))


@pytest.mark.parametrize("space", [PIXELS, DISCRETE], ids=["continuous", "discrete"])
@pytest.mark.parametrize("block", [1, 2])
def test_a_plan_has_the_actions_that_would_be_taken_first(block: int, space: ActionSpace) -> None:
    world, planner = world_of(space, block=block), GoalPlanner(planner_of(space), COSTS)
    plan = planner.plan(world, picture(99), picture(0))
    assert plan.shape == (3 * block, *space.shape)
    np.testing.assert_array_equal(plan[: 2 * block], acted(planner, world)[: 2 * block])


def test_pictures_of_either_layout_are_the_same() -> None:
    world, planner = world_of(), GoalPlanner(planner_of(), COSTS)
    last = [picture(seed).transpose(1, 2, 0) for seed in (99, 0)]
    np.testing.assert_array_equal(planner.plan(world, *last), planner.plan(world, picture(99), picture(0)))


@pytest.mark.parametrize(
    "wrong",
    [BLANK.astype(np.float32), BLANK[0], BLANK[:, :8], np.zeros((3, SIDE, SIDE), np.uint8), BLANK[None]],
    ids=["float", "no channel", "other size", "colours", "a batch"],
)
def test_pictures_that_the_world_was_not_trained_on_are_refused_with_what_it_was(wrong: np.ndarray) -> None:
    world, planner = world_of(), GoalPlanner(planner_of(), COSTS)
    planner.reset(world, BLANK)
    uses = (
        lambda: planner.plan(world, wrong, BLANK),
        lambda: planner.plan(world, BLANK, wrong),
        lambda: planner.reset(world, wrong),
        lambda: planner.act(wrong),
    )
    for use in uses:
        with pytest.raises(ValueError, match=r"the world was trained on uint8 \(1, 16, 16\) or \(16, 16, 1\)"):
            use()


def test_what_needs_an_episode_says_how_to_begin_one() -> None:
    planner = GoalPlanner(planner_of(), COSTS)
    with pytest.raises(ValueError, match=r"begin it with reset\(world, goal\)"):
        planner.act(BLANK)
    with pytest.raises(ValueError, match=r"this world sees 2: use reset\(world, goal\) and act"):
        planner.plan(world_of(history=2), BLANK, BLANK)


def test_a_world_without_the_head_of_a_cost_is_refused() -> None:
    with pytest.raises(ValueError, match="no head value"):
        GoalPlanner(planner_of(), COSTS).reset(make_world(side=SIDE), BLANK)
