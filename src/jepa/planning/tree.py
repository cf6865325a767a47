"""A tree of imagined steps: breadth first, each place once, around steps that failed before."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from jepa.planning.tried import Tried, distances
from jepa.planning.types import Moments, Search, Steps
from jepa.types import Positive, PositiveInt

FINER = (1.0, 0.75, 0.5)
"""Factors of the radius: finer trees are grown if the goal is not found."""
NEAR = 3
"""Steps to the goal from which on every plan is made anew."""
PARTS = (1.0, 0.75, 0.5, 0.25)
"""Sizes of the last continuous action, so that a plan does not pass its goal."""


class Level(NamedTuple):
    """The n new places that are reached in the same number of steps."""

    moments: Moments
    places: Tensor
    """[n, k]"""
    parents: Tensor
    """long [n]: rows of the level before"""
    actions: Tensor
    """[n, A]: what leads there"""


class Way(NamedTuple):
    cost: float
    """Of its end."""
    path: Tensor
    """[H, A]"""


class Tree:
    """From now on all choices of action are imagined in all places, and of what they lead to, new places are kept.

    A place is new if none before it is within `radius`. The first one whose cost is at most `tolerance` ends the plan;
    if none is, that of least cost does. Lengths and costs count steps of median length, as the head `metric` does.

    Imagined steps may be wrong, such as short cuts through a wall, so a step that led elsewhere than imagined by more
    than `surprise` is not planned again in the same episode, and none like it within `detour` (as real-time search
    learns from what it executes, e.g. Koenig and Likhachev 2006); nor is one that was made twice. The rest of a plan is
    kept as long as it leads to within `drift` of the goal: of many plans the shortest is the one with a short cut, and
    plans that change go to and fro.
    """

    is_discrete = None
    needs = ("metric",)

    def __init__(
        self, *, radius: Positive = 1.2, tolerance: Positive = 1.0, surprise: Positive = 0.8, detour: Positive = 1.5,
        drift: Positive = 3.0, horizon: PositiveInt = 40, execute: PositiveInt = 2,
    ) -> None:  # fmt: skip
        self.radius, self.tolerance, self.drift = radius, tolerance, drift
        self.surprise, self.detour = surprise, detour
        self.horizon, self.execute = horizon, execute

    def __call__(self, search: Search) -> Tensor:
        """Plans end with zeros, or with their last action if actions are discrete."""
        kind = torch.int64 if search.num_actions else torch.float32
        plans = torch.zeros(len(search.steps), search.horizon, search.size, dtype=kind)
        for row, steps in enumerate(search.steps):
            if steps is not None:
                path = self._plan(steps, None if search.warm_start is None else search.warm_start[row])
                plans[row, : len(path)] = path
                if search.num_actions:
                    plans[row, len(path) :] = path[-1]
        return plans

    def _plan(self, steps: Steps, rest: Tensor | None) -> Tensor:
        """[H, A], with the rest of the last plan: -> [h, A], at most as many steps"""
        tried = Tried.of(steps, self.surprise)
        kept = None if rest is None else self._kept(steps, rest, tried)
        if kept is not None:
            return kept
        ways: list[Way] = []
        for avoided in (tried, tried.forgotten())[: 2 if len(tried.before) else 1]:
            for factor in FINER:
                ways.append(self._grow(steps, avoided, factor * self.radius))
                if ways[-1].cost <= self.tolerance:
                    return ways[-1].path
        return min(ways, key=lambda way: way.cost).path

    def _kept(self, steps: Steps, rest: Tensor, tried: Tried) -> Tensor | None:
        """The rest of the last plan up to where it is nearest to the goal; None if that is too far, or soon reached."""
        moments, costs = last(steps.past), []
        for action in rest:
            after = steps.step(moments, action[None])
            if tried.bars(steps.places(moments), steps.places(after), self.detour).any():
                break
            costs.append(steps.costs_of(moments, action[None], after)[0])
            moments = after
        if not costs:
            return None
        nearest = int(torch.stack(costs).argmin())
        return rest[: nearest + 1] if nearest >= NEAR and costs[nearest] <= self.drift else None

    def _grow(self, steps: Steps, tried: Tried, radius: float) -> Way:
        """The way to the first place at the goal, else to that of least cost."""
        now = last(steps.past)
        known = steps.places(now)
        levels = [Level(now, known, torch.zeros(1, dtype=torch.long), steps.choices[:1])]
        least, end = torch.inf, (0, 0, 0)  # level, row and choice
        while len(levels) <= self.horizon and len(levels[-1].places):
            level, count = levels[-1], len(steps.choices)
            rows = torch.arange(len(level.places)).repeat_interleave(count)
            actions, before = steps.choices.repeat(len(level.places), 1), pick(level.moments, rows)
            after = steps.step(before, actions)
            places = steps.places(after)
            barred = tried.bars(level.places[rows], places, self.detour)
            costs = steps.costs_of(before, actions, after).masked_fill(barred, torch.inf)
            best = int(costs.argmin())
            if costs[best] < least:
                least, end = costs[best].item(), (len(levels) - 1, best // count, best % count)
            if least <= self.tolerance:
                break
            new = new_rows(places, known, radius, ~barred)
            known = torch.cat([known, places[new]])
            levels.append(Level(pick(after, new), places[new], rows[new], actions[new]))
        return Way(least, way_to(levels, steps, *end))


def way_to(levels: list[Level], steps: Steps, depth: int, row: int, choice: int) -> Tensor:
    """The actions that lead to a row of a level, and the one after them: [depth + 1, A]"""
    path = [last_action(steps, pick(levels[depth].moments, torch.tensor([row])), choice)]
    for level in levels[depth:0:-1]:
        path.append(level.actions[row])
        row = int(level.parents[row])
    return torch.stack(path[::-1])


def last_action(steps: Steps, moment: Moments, choice: int) -> Tensor:
    """The choice, or for continuous actions the choice or part of one that ends nearest to the goal: [A]"""
    if steps.choices.dtype == torch.int64:
        return steps.choices[choice]
    parts = torch.cat([part * steps.choices for part in PARTS])
    before = pick(moment, torch.zeros(len(parts), dtype=torch.long))
    return parts[steps.costs_of(before, parts, steps.step(before, parts)).argmin()]


def new_rows(places: Tensor, known: Tensor, radius: float, allowed: Tensor) -> Tensor:
    """Rows of places [n, k] that are further than `radius` from all known ones and from those taken before: [m]"""
    rows = torch.nonzero(allowed & (distances(places, known) > radius).all(dim=1))[:, 0]
    is_far = distances(places[rows], places[rows]) > radius
    left, taken = torch.ones(len(rows), dtype=torch.bool), []
    for row in range(len(rows)):
        if left[row]:
            taken.append(row)
            left &= is_far[row]
    return rows[taken]


def pick(moments: Moments, rows: Tensor) -> Moments:
    return Moments(moments.states[rows], moments.actions[rows])


def last(moments: Moments) -> Moments:
    return Moments(moments.states[-1:], moments.actions[-1:])
