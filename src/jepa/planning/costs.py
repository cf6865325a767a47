"""Costs of imagined futures; each is weighted, and those of a configuration are summed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from jepa.planning.types import Cost, Imagined
from jepa.types import NonNegative, Share

Over = Literal["sum", "mean", "last", "min", "reach"]
"""Steps of a plan that count, see `over_steps`."""
TIE = 0.01
"""Weight of the mean of all steps beside the least of them, so that of plans that arrive the earlier one wins."""


class GCValue:
    """Minus the goal-conditioned value of the predicted states: the expected number of steps left, at least 0."""

    needs = ("value",)

    def __init__(self, *, weight: NonNegative = 1.0, over: Over = "sum") -> None:
        self.weight, self.over = weight, over

    def __call__(self, world: Any, imagined: Imagined) -> Tensor:
        steps = (-to_goal(world.heads["value"], imagined)[..., 0]).clamp(min=0)
        return self.weight * over_steps(steps, self.over)


class TemporalDistance:
    """The predicted number of steps between the predicted states and the goal."""

    needs = ("distance",)

    def __init__(self, *, weight: NonNegative = 1.0, over: Over = "sum") -> None:
        self.weight, self.over = weight, over

    def __call__(self, world: Any, imagined: Imagined) -> Tensor:
        steps = nn.functional.softplus(to_goal(world.heads["distance"], imagined)[..., 0])
        return self.weight * over_steps(steps, self.over)


class ProbeDistance:
    """Distance of the quantities that the probe reads from the predicted states and from the goal.

    `columns` are the first quantities that count, e.g. 2 for a position; null takes all.
    """

    needs = ("probe",)

    def __init__(self, *, weight: NonNegative = 1.0, over: Over = "sum", columns: int | None = None) -> None:
        self.weight, self.over, self.columns = weight, over, columns

    def __call__(self, world: Any, imagined: Imagined) -> Tensor:
        read = world.heads["probe"]
        at_goal = imagined.goal.flatten().repeat(imagined.history.shape[-3])
        states, goal = (read(seen)[..., : self.columns] for seen in (imagined.seen, at_goal))
        return self.weight * over_steps((states - goal).norm(dim=-1), self.over)


class LatentL2:
    """Mean squared distance of the predicted states from the goal, as in DINO-WM and LeWorldModel."""

    needs = ()

    def __init__(self, *, weight: NonNegative = 1.0, over: Over = "sum") -> None:
        self.weight, self.over = weight, over

    def __call__(self, world: Any, imagined: Imagined) -> Tensor:
        return self.weight * over_steps((imagined.states - imagined.goal).square().mean(dim=(-2, -1)), self.over)


class MetricDistance:
    """The distance of the predicted states from the goal by the metric: in steps, straight through walls."""

    needs = ("metric",)

    def __init__(self, *, weight: NonNegative = 1.0, over: Over = "sum") -> None:
        self.weight, self.over = weight, over

    def __call__(self, world: Any, imagined: Imagined) -> Tensor:
        places = world.heads["metric"](imagined.states.flatten(2))
        steps = (places - world.heads["metric"](imagined.goal.flatten())).norm(dim=-1)
        return self.weight * over_steps(steps, self.over)


class Reward:
    """Minus the predicted rewards, discounted, and with a continuation head no further than the predicted end."""

    needs = ("reward", "continuation")

    def __init__(self, *, weight: NonNegative = 1.0, gamma: Share = 0.99) -> None:
        self.weight, self.gamma = weight, gamma

    def discount(self, world: Any) -> float:
        return self.gamma

    def __call__(self, world: Any, imagined: Imagined) -> Tensor:
        states = imagined.seen
        rewards = world.heads["reward"](states)[..., 0]  # [N, H]
        goes_on = world.heads["continuation"](states)[..., 0].sigmoid()
        alive = torch.cat([torch.ones_like(goes_on[:, :1]), goes_on[:, :-1]], dim=1).cumprod(dim=1)
        discounts = self.discount(world) ** torch.arange(rewards.shape[1])
        return -self.weight * (discounts * alive * rewards).sum(dim=1)


class Return(Reward):
    """Minus the predicted rewards, and the return that is expected after the last predicted state (as in TD-MPC).

    Without a `gamma` of its own, a step is discounted as in the head.
    """

    needs = (*Reward.needs, "return")

    def __init__(self, *, weight: NonNegative = 1.0, gamma: Share | None = None) -> None:
        super().__init__(weight=weight)
        self.own = gamma

    def discount(self, world: Any) -> float:
        return world.gamma if self.own is None else self.own

    def __call__(self, world: Any, imagined: Imagined) -> Tensor:
        last = imagined.seen[:, -1]
        goes_on = world.heads["continuation"](imagined.seen)[..., 0].sigmoid().prod(dim=1)
        rest = self.discount(world) ** imagined.states.shape[1] * goes_on * world.heads["return"](last)[:, 0]
        return super().__call__(world, imagined) - self.weight * rest


class Control:
    """Mean square of the actions, so that plans are no wilder than they need to be."""

    needs = ()

    def __init__(self, *, weight: NonNegative = 0.01) -> None:
        self.weight = weight

    def __call__(self, world: Any, imagined: Imagined) -> Tensor:
        return self.weight * imagined.actions.float().square().mean(dim=(1, 2))


class Constraint:
    """Quantities that the probe reads stay between bounds; what lies beyond is penalised by `weight` per unit and step.

    `low` and `high` have a bound for each quantity, or null.
    """

    needs = ("probe",)

    def __init__(
        self, *, low: Sequence[float | None] = (), high: Sequence[float | None] = (), weight: NonNegative = 1000.0
    ) -> None:
        self.low, self.high, self.weight = low, high, weight

    def __call__(self, world: Any, imagined: Imagined) -> Tensor:
        read = world.heads["probe"](imagined.seen)  # [N, H, Q]
        beyond = torch.zeros(read.shape[:2])
        for column, (low, high) in enumerate(zip(self.low, self.high, strict=True)):
            quantity = read[..., column]
            beyond = beyond + (0 if low is None else (low - quantity).clamp(min=0))
            beyond = beyond + (0 if high is None else (quantity - high).clamp(min=0))
        return self.weight * beyond.sum(dim=1)


TOWARDS_GOALS = (GCValue, TemporalDistance, ProbeDistance, LatentL2, MetricDistance)
"""Costs that an environment without goals cannot have."""


def to_goal(head: nn.Module, imagined: Imagined) -> Tensor:
    """A head of states and goals, on all predicted states: -> [N, H, size]"""
    states, goal = imagined.seen, imagined.goal.flatten()
    return head(states, goal.expand(*states.shape[:2], -1))


def over_steps(values: Tensor, over: str) -> Tensor:
    """[N, H] -> [N]: of all steps together, on average, of the last one alone, or of the one nearest to the goal.

    The sum prefers to stay where a cost is wrongly low all the time; the least cost prefers to arrive at any time.
    `reach` sums the least cost until each step: it prefers to arrive early, and what follows does not count, which a
    world that has only seen episodes that end at the goal does not know.
    """
    if over == "reach":
        return values.cummin(dim=1).values.sum(dim=1)
    if over == "min":
        return values.amin(dim=1) + TIE * values.mean(dim=1)
    return {"sum": values.sum, "mean": values.mean}[over](dim=1) if over != "last" else values[:, -1]


def total(costs: Mapping[str, Cost], world: Any, imagined: Imagined) -> Tensor:
    """The sum of all costs: [N]"""
    return torch.stack([cost(world, imagined) for cost in costs.values()]).sum(dim=0)


def cost_at_rest(costs: Mapping[str, Cost], world: Any, state: Tensor, goal: Tensor) -> float:
    """The cost of having been at a state [S, Z] for the whole history."""
    history = state.expand(world.history, *state.shape)
    return total(costs, world, Imagined(state[None, None], history, goal, torch.zeros(1, 1, 1))).item()
