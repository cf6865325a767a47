"""One imagined step after the other, for planners that build trees instead of drawing whole plans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from jepa.planning.costs import total
from jepa.planning.types import Cost, Imagined, Moments
from jepa.types import ActionSpace


class WorldSteps:
    """As jepa.planning.types.Steps, by the dynamics, the costs and the head `metric` of a world."""

    def __init__(
        self, world: Any, costs: Mapping[str, Cost], goal: Tensor, past: Moments, done: Sequence[Tensor]
    ) -> None:
        self.world, self.costs, self.goal, self.past, self.done = world, costs, goal, past, done
        self.choices = choices_of(world.contract.actions, world.contract.block)

    def step(self, moments: Moments, actions: Tensor) -> Moments:
        acted = torch.cat([moments.actions, actions[:, None]], dim=1)
        following = self.world.step(moments.states, self.world.unscale(acted))
        return Moments(torch.cat([moments.states[:, 1:], following[:, None]], dim=1), acted[:, 1:])

    def costs_of(self, moments: Moments, actions: Tensor, following: Moments) -> Tensor:
        states = following.states[:, -1:]
        return total(self.costs, self.world, Imagined(states, moments.states, self.goal, actions[:, None]))

    def places(self, moments: Moments) -> Tensor:
        return self.world.heads["metric"](moments.states[:, -1].flatten(1))


def choices_of(space: ActionSpace, block: int) -> Tensor:
    """All discrete actions, or the largest ones along each axis and each diagonal of two; held for a block: [n, A]"""
    if space.is_discrete:
        return torch.arange(space.num_actions)[:, None].expand(-1, block)
    axes = torch.eye(space.size)
    ahead = [*axes, *(first + sign * second for first, second in combinations(axes, 2) for sign in (1, -1))]
    return torch.stack([sign * direction for direction in ahead for sign in (1, -1)]).repeat(1, block)
