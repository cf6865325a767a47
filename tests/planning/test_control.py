"""Controllers: what a world sees, which steps of a plan are executed, and that episodes do not touch each other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_world import PIXELS, make_world
from torch import Tensor

from jepa.envs.policies import StickyRandom
from jepa.envs.two_rooms import TwoRooms
from jepa.envs.types import EnvTraits
from jepa.planning.cem import CEM
from jepa.planning.control import Blind, Function, Goals, HeadController, Planning, TruePlanning, policy_plan
from jepa.planning.costs import Control, GCValue, LatentL2, MetricDistance
from jepa.planning.policy import PolicyPlanner
from jepa.planning.random_shooting import RandomShooting
from jepa.planning.tree import Tree
from jepa.planning.types import Search
from jepa.types import ActionSpace

DISCRETE = ActionSpace(num_actions=3)
SIDE = 16


class Recorder:
    """Plans whose action k of plan n is 10 n + k hundredths, the same for all numbers of an action."""

    def __init__(self, horizon: int, execute: int, *, discrete: bool = False) -> None:
        self.horizon, self.execute, self.discrete = horizon, execute, discrete
        self.searches: list[Search] = []

    def __call__(self, search: Search) -> Tensor:
        self.searches.append(search)
        steps = torch.arange(self.horizon) + 10 * (len(self.searches) - 1)
        plan = steps[None, :, None].expand(len(search.generators), -1, search.size)
        return plan % 3 if self.discrete else plan / 100


def pictures(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (count, 1, SIDE, SIDE), dtype=np.uint8)


def run(control: Planning, steps: int, count: int = 2) -> list[np.ndarray]:
    """The actions of some steps in which every frame differs."""
    control.begin(Goals(pictures(count, 99), np.zeros((count, 2))), range(count), steps)
    active = np.ones(count, dtype=bool)
    return [control.act(step, pictures(count, step), np.zeros((count, 2)), active) for step in range(steps)]


def hundredths(actions: list[np.ndarray]) -> list[int]:
    """Of actions in pixels, which are four times those of plans."""
    return [round(float(action.flatten()[0]) / 4 * 100) for action in actions]


def test_of_each_plan_the_first_steps_are_executed() -> None:
    planner = Recorder(horizon=5, execute=2)
    actions = run(Planning(make_world(side=SIDE), planner, {"cost": Control()}), 6)
    assert hundredths(actions) == [0, 1, 10, 11, 20, 21]
    assert all(action.shape == (2, 2) for action in actions)


def test_the_next_search_starts_from_the_rest_of_the_plan() -> None:
    planner = Recorder(horizon=5, execute=2)
    run(Planning(make_world(side=SIDE), planner, {"cost": Control()}), 5)
    assert planner.searches[0].warm_start is None
    for number, searched in enumerate(planner.searches[1:]):
        assert searched.warm_start is not None
        rest = [10 * number + k for k in (2, 3, 4)]
        torch.testing.assert_close(searched.warm_start[0, :, 0], torch.tensor([*rest, 0, 0]) / 100)


def test_discrete_plans_are_continued_by_their_last_action() -> None:
    planner = Recorder(horizon=4, execute=3, discrete=True)
    control = Planning(make_world(DISCRETE, side=SIDE), planner, {"cost": Control()})
    actions = run(control, 4)
    assert [action.tolist() for action in actions] == [[0, 0], [1, 1], [2, 2], [1, 1]]
    warm_start = planner.searches[1].warm_start
    assert warm_start is not None
    assert warm_start[0, :, 0].tolist() == [0, 0, 0, 0]
    assert warm_start.dtype == torch.int64


@pytest.mark.parametrize("execute", [1, 2, 3])
@pytest.mark.parametrize("history", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("space", [None, DISCRETE], ids=["continuous", "discrete"])
def test_the_history_is_what_was_seen_and_done_before_it_the_first_frame_repeated(
    space: ActionSpace | None, history: int, execute: int
) -> None:
    world = make_world(space, history=history, side=SIDE) if space else make_world(history=history, side=SIDE)
    planner, steps = Recorder(horizon=5, execute=execute, discrete=space is not None), 7
    control = Planning(world, planner, {"cost": Control()})
    histories: list[tuple[Tensor, Tensor]] = []
    plan = control._plan

    def recording(step: int, active: np.ndarray) -> None:
        histories.append(control._history())
        plan(step, active)

    control._plan = recording  # pyright: ignore[reportAttributeAccessIssue]
    run(control, steps)
    encoded = [world.encode(pictures(2, step)) for step in range(steps)]
    for number, (states, actions) in enumerate(histories):
        now = number * execute
        for place in range(history):
            torch.testing.assert_close(states[:, place], encoded[max(0, now - history + 1 + place)])
        assert actions.shape[:2] == (2, history - 1)
        idle = [torch.zeros_like(control.done[0])] * max(0, history - 1 - now)
        expected = [*idle, *control.done[max(0, now - history + 1) : now]]
        for place in range(history - 1):
            assert torch.equal(actions[:, place], expected[place])


@pytest.mark.parametrize("space", [None, DISCRETE], ids=["continuous", "discrete"])
def test_blocks_of_actions_are_executed_one_by_one_and_only_their_first_frames_are_seen(
    space: ActionSpace | None,
) -> None:
    world = make_world(space, block=3, side=SIDE) if space else make_world(block=3, side=SIDE)

    class Blocks(Recorder):
        """Every action of a block differs."""

        def __call__(self, search: Search) -> Tensor:
            plan = super().__call__(search)
            ramp = torch.arange(search.size)
            return (plan + ramp) % 3 if self.discrete else plan + ramp / 1000

    planner = Blocks(horizon=2, execute=1, discrete=space is not None)
    control = Planning(world, planner, {"cost": Control()})
    actions = run(control, 6)
    assert planner.searches[0].size == (3 if space else 6)
    assert len(control.seen) == 2
    for step, action in enumerate(actions):
        number, part = divmod(step, 3)
        if space:
            assert action.tolist() == [(10 * number + part) % 3] * 2
        else:
            expected = 4 * (10 * number / 100 + (2 * part + np.arange(2)) / 1000)
            np.testing.assert_allclose(action, np.stack([expected] * 2), rtol=1e-4, atol=1e-5)
    for number, seen in enumerate(control.seen):
        torch.testing.assert_close(seen, world.encode(pictures(2, 3 * number)))


def test_the_cost_is_that_of_the_states_which_the_candidates_lead_to() -> None:
    world = make_world(history=2, side=SIDE)
    planner = Recorder(horizon=3, execute=1)
    control = Planning(world, planner, {"latent": LatentL2(over="last"), "control": Control(weight=2.0)})
    run(control, 3)
    candidates = torch.rand(2, 5, 3, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1
    del control.done[-1]  # it was done after the search
    history = control._history()
    costs = planner.searches[-1].cost(candidates)
    for episode in range(2):
        for number in range(5):
            actions = torch.cat([history[1][episode], candidates[episode, number]])[None]
            reached = world.rollout(history[0][episode][None], world.unscale(actions))[0, -1]
            expected = (reached - control.goals[episode]).square().mean() + 2 * candidates[
                episode, number
            ].square().mean()
            torch.testing.assert_close(costs[episode, number], expected)


def controller(kind: str) -> Any:
    env = TwoRooms()
    traits = EnvTraits.of(env)
    world = make_world(heads={"value": 1, "policy": 2, "clone": 2, "metric": 2})
    kinds = {
        "planning": lambda: Planning(world, CEM(samples=16, iterations=2, elites=4, horizon=4), {"v": GCValue()}),
        "shooting": lambda: Planning(world, RandomShooting(samples=16, horizon=4), {"l2": LatentL2()}),
        "tree": lambda: Planning(world, Tree(horizon=4), {"metric": MetricDistance()}),
        "policy": lambda: HeadController(world, "policy"),
        "random": lambda: Blind(StickyRandom(), env.actions),
        "expert": lambda: Function(env.expert),
        "true": lambda: TruePlanning(traits, env.actions, CEM(samples=16, iterations=2, elites=4), env.path_length),
    }
    return kinds[kind]()


def acted(kind: str, seeds: list[int], steps: int = 5, inactive: int | None = None) -> np.ndarray:
    """Actions [steps, B, 2] in two rooms; environment n starts from task `seeds[n]`."""
    env, control = TwoRooms(), controller(kind)
    starts, goals = (np.stack(states) for states in zip(*(env.task(seed) for seed in seeds), strict=True))
    frames, states = env.reset(seeds, starts, goals)
    control.begin(Goals(env.render(goals), goals), seeds, steps)
    actions = []
    for step in range(steps):
        active = np.ones(len(seeds), dtype=bool)
        if inactive is not None:
            active[inactive] = step < 2
        actions.append(control.act(step, frames, states, active).astype(np.float32).clip(-4, 4))
        frames, states = env.step(actions[-1])[:2]
    return np.stack(actions)


@pytest.mark.parametrize("kind", ["planning", "shooting", "tree", "policy", "random", "expert", "true"])
def test_actions_of_an_episode_do_not_depend_on_what_it_is_batched_with(kind: str) -> None:
    everything = acted(kind, list(range(20, 50)))
    for first, count in ((0, 1), (17, 1), (8, 8)):
        part = acted(kind, list(range(20 + first, 20 + first + count)))
        np.testing.assert_array_equal(part, everything[:, first : first + count])


@pytest.mark.parametrize("kind", ["planning", "shooting", "tree", "policy", "random", "expert", "true"])
def test_an_episode_that_is_over_changes_no_other(kind: str) -> None:
    all_active, one_over = acted(kind, [3, 4, 5]), acted(kind, [3, 4, 5], inactive=1)
    np.testing.assert_array_equal(all_active[:, [0, 2]], one_over[:, [0, 2]])


@pytest.mark.parametrize("space", [None, DISCRETE], ids=["continuous", "discrete"])
@pytest.mark.parametrize(("history", "block"), [(1, 1), (3, 1), (2, 3)])
def test_a_head_acts_on_the_frames_of_its_own_episode(history: int, block: int, space: ActionSpace | None) -> None:
    size = block * (3 if space else 2)
    world = make_world(space or PIXELS, history=history, block=block, side=SIDE, heads={"policy": size})
    control = HeadController(world, "policy")
    goals = Goals(pictures(2, 99), np.zeros((2, 2)))
    for first in (0, 10):  # of two episodes
        control.begin(goals, range(2), 7)
        for step in range(7):
            acted = control.act(step, pictures(2, first + step), np.zeros((2, 2)), np.ones(2, dtype=bool))
            times = [max(0, step - block * back) for back in reversed(range(history))]
            states = torch.stack([world.encode(pictures(2, first + time)) for time in times], dim=1)
            outputs = world.heads["policy"](states.flatten(1), world.encode(goals.frames).flatten(1))
            if space:
                assert acted.tolist() == outputs[:, :3].argmax(dim=1).tolist()
            else:
                np.testing.assert_allclose(acted, 4 * outputs[:, :2].clamp(-1, 1).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("space", [None, DISCRETE], ids=["continuous", "discrete"])
@pytest.mark.parametrize("history", [1, 3])
def test_the_policy_imagines_from_the_history_and_its_own_actions(history: int, space: ActionSpace | None) -> None:
    world = make_world(space or PIXELS, history=history, side=SIDE, heads={"policy": 3 if space else 2})
    states = [state[:, None] for state in world.encode(np.stack([pictures(2, n) for n in range(history)]))]
    drawn = torch.rand(2, history - 1, 2, generator=torch.Generator().manual_seed(0))
    actions = torch.randint(3, (2, history - 1, 1)) if space else drawn
    goals = world.encode(pictures(2, 99))
    plan = policy_plan(world, (torch.cat(states, dim=1), actions), goals, 4)
    done = list(actions.unbind(dim=1))
    for step in range(4):
        outputs = world.heads["policy"](torch.cat(states[-history:], dim=1).flatten(1), goals.flatten(1))
        expected = outputs.argmax(dim=1, keepdim=True) if space else outputs.clamp(-1, 1)
        torch.testing.assert_close(plan[:, step], expected)
        done.append(expected)
        past = torch.stack(done[-history:], dim=1)
        states.append(world.step(torch.cat(states[-history:], dim=1), world.unscale(past))[:, None])


def test_seeds_make_plans_differ() -> None:
    one, other = acted("planning", [3]), acted("planning", [4])
    assert not np.array_equal(one, other)


def test_a_head_that_a_cost_needs_and_the_world_lacks_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"no head value; add it to objective.heads"):
        Planning(make_world(), CEM(), {"gc_value": GCValue()})
    with pytest.raises(ValueError, match=r"no head policy; add it to objective.heads"):
        Planning(make_world(), PolicyPlanner(), {})


def test_the_film_begins_with_the_first_frame_and_has_one_picture_for_each() -> None:
    world = make_world(side=SIDE, heads={"decoder": 32 * 32})
    control = Planning(world, Recorder(horizon=4, execute=2), {"cost": Control()})
    run(control, 5)
    film = control.film(0, 4)
    assert film is not None
    assert film.shape == (4, 1, 32, 32)
    assert film.dtype == torch.uint8
    assert Planning(make_world(side=SIDE), CEM(), {}).film(0, 4) is None
