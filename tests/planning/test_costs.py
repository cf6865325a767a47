"""Costs of imagined futures against plain loops."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from jepa.planning.costs import (
    Constraint,
    Control,
    GCValue,
    LatentL2,
    ProbeDistance,
    Return,
    Reward,
    TemporalDistance,
    cost_at_rest,
    over_steps,
    total,
)
from jepa.planning.types import Imagined

N, H, S, Z = 3, 4, 2, 3


def imagined(history: int = 1) -> Imagined:
    random = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=random)  # noqa: E731
    return Imagined(draw(N, H, S, Z), draw(history, S, Z), draw(S, Z), draw(N, H, 2))


def world(**heads: Any) -> Any:
    return SimpleNamespace(heads=heads)


def gap(states: Tensor, goals: Tensor) -> Tensor:
    """A head of a state and a goal: the sum of their differences."""
    return (states - goals).sum(dim=-1, keepdim=True)


def each_step(function: Any) -> Tensor:
    """[N, H] of a function of the number of a candidate and of a step"""
    return torch.tensor([[float(function(n, h)) for h in range(H)] for n in range(N)])


@pytest.mark.parametrize(("over", "expected"), [("sum", [6.0, 15.0]), ("mean", [2.0, 5.0]), ("last", [3.0, 6.0])])
def test_steps_count_together_on_average_or_the_last_alone(over: str, expected: list[float]) -> None:
    assert over_steps(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), over).tolist() == expected


def test_by_the_least_cost_a_plan_that_arrives_wins_the_earlier_the_better() -> None:
    stays, late, early = [3.0, 3.0, 3.0, 3.0], [9.0, 8.0, 7.0, 0.0], [9.0, 8.0, 0.0, 0.0]
    costs = torch.tensor([stays, late, early])
    assert over_steps(costs, "sum").argmin() == 0
    assert over_steps(costs, "min").argsort().tolist() == [2, 1, 0]


def test_after_its_nearest_step_a_plan_that_reaches_the_goal_costs_no_more() -> None:
    stays, arrives, early = [1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 4.0, 5.0], [0.0, 9.0, 9.0, 9.0]
    costs = torch.tensor([stays, arrives, early])
    assert over_steps(costs, "sum").argmin() == 0
    assert over_steps(costs, "reach").tolist() == [4.0, 1.0, 0.0]


@pytest.mark.parametrize("over", ["sum", "mean", "last", "min", "reach"])
def test_latent_distance_is_the_mean_square_of_all_numbers_of_a_state(over: Any) -> None:
    seen = imagined()
    rows = each_step(lambda n, h: (seen.states[n, h] - seen.goal).square().mean())
    torch.testing.assert_close(LatentL2(weight=2.0, over=over)(world(), seen), 2 * over_steps(rows, over))


def test_the_value_counts_negatively_and_the_distance_is_positive() -> None:
    seen = imagined()
    rows = each_step(lambda n, h: (seen.states[n, h] - seen.goal).sum())
    torch.testing.assert_close(GCValue()(world(value=gap), seen), (-rows).clamp(min=0).sum(dim=1))
    expected = rows.exp().log1p().sum(dim=1)
    torch.testing.assert_close(TemporalDistance()(world(distance=gap), seen), expected)


@pytest.mark.parametrize("columns", [None, 2])
def test_the_distance_of_what_the_probe_reads_takes_its_first_columns(columns: int | None) -> None:
    seen = imagined()
    rows = each_step(lambda n, h: (seen.states[n, h] - seen.goal).flatten()[:columns].norm())
    found = ProbeDistance(columns=columns, over="last")(world(probe=lambda states: states), seen)
    torch.testing.assert_close(found, rows[:, -1])


def test_rewards_are_discounted_and_end_where_the_world_does() -> None:
    seen = imagined()
    heads = {"reward": lambda states: states[..., :1], "continuation": lambda states: states[..., 1:2]}
    expected = []
    for n in range(N):
        alive, gained = 1.0, 0.0
        for h in range(H):
            state = seen.states[n, h].flatten()
            gained += 0.9**h * alive * float(state[0])
            alive *= float(state[1].sigmoid())
        expected.append(-2 * gained)
    torch.testing.assert_close(Reward(weight=2.0, gamma=0.9)(world(**heads), seen), torch.tensor(expected))


def test_a_return_adds_what_is_expected_after_the_last_step_unless_the_world_has_ended() -> None:
    seen = imagined()
    heads = {
        "reward": lambda states: states[..., :1], "continuation": lambda states: states[..., 1:2],
        "return": lambda states: states[..., 2:3],
    }  # fmt: skip
    expected = Reward(weight=2.0, gamma=0.9)(world(**heads), seen)
    for n in range(N):
        alive = seen.states[n].flatten(1)[:, 1].sigmoid().prod()
        expected[n] -= 2 * 0.9**H * alive * seen.states[n, -1].flatten()[2]
    torch.testing.assert_close(Return(weight=2.0, gamma=0.9)(world(**heads), seen), expected)
    fitted = world(**heads)
    fitted.gamma = 0.9
    torch.testing.assert_close(Return(weight=2.0)(fitted, seen), expected)


def test_control_is_the_mean_square_of_actions() -> None:
    seen = imagined()
    expected = torch.stack([actions.square().mean() for actions in seen.actions])
    torch.testing.assert_close(Control(weight=0.5)(world(), seen), 0.5 * expected)


def test_a_constraint_penalises_what_lies_beyond_its_bounds_alone() -> None:
    seen = imagined()
    cost = Constraint(low=[None, -0.2], high=[0.5, 0.1], weight=10.0)

    def beyond(n: int, h: int) -> float:
        first, second = seen.states[n, h].flatten()[:2].tolist()
        return max(0, first - 0.5) + max(0, -0.2 - second) + max(0, second - 0.1)

    expected = 10 * each_step(beyond).sum(dim=1)
    torch.testing.assert_close(cost(world(probe=lambda states: states[..., :2]), seen), expected)
    inside = seen._replace(states=torch.zeros(N, H, S, Z))
    assert cost(world(probe=lambda states: states[..., :2]), inside).tolist() == [0.0] * N


def test_costs_are_summed() -> None:
    seen = imagined()
    costs = {"latent_l2": LatentL2(), "control": Control(weight=3.0)}
    expected = LatentL2()(world(), seen) + Control(weight=3.0)(world(), seen)
    torch.testing.assert_close(total(costs, world(), seen), expected)


@pytest.mark.parametrize("history", [1, 2, 3, 6])
def test_heads_see_the_states_before_the_plan_and_the_imagined_ones(history: int) -> None:
    seen = imagined(history)
    assert seen.seen.shape == (N, H, history * S * Z)
    for n in range(N):
        states = [*seen.history, *seen.states[n]]
        for h in range(H):
            expected = torch.stack(states[h + 1 : h + 1 + history])
            assert torch.equal(seen.seen[n, h], expected.flatten())


def test_costs_read_heads_with_the_whole_history() -> None:
    """Heads that read the last but one frame: the first step's cost is of the last known state."""
    seen = imagined(2)
    before = seen._replace(states=torch.cat([seen.history[-1:].expand(N, 1, S, Z), seen.states[:, :-1]], dim=1))
    before = before._replace(history=seen.history[-1:])
    heads = {"value": lambda states, goals: gap(states[..., : S * Z], goals), "probe": lambda s: s[..., : S * Z]}
    frames = {"value": gap, "probe": lambda states: states}
    for cost in (GCValue(), ProbeDistance(), Constraint(low=[0.0] * S * Z, high=[0.1] * S * Z)):
        torch.testing.assert_close(cost(world(**heads), seen), cost(world(**frames), before))


def test_the_cost_at_rest_is_that_of_a_state_which_never_changed() -> None:
    seen = imagined(3)
    still = SimpleNamespace(heads={"value": lambda states, goals: states.unflatten(-1, (3, -1)).var(dim=-2)}, history=3)
    assert cost_at_rest({"value": GCValue()}, still, seen.history[0], seen.goal) == 0
