"""Steps of an episode that a planner leaves out, since they were tried in vain."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from jepa.planning.types import Moments, Steps

SAME = 0.5
"""Largest distance of two places that count as the same, in steps."""
ALIKE = 0.5
"""Least cosine of the directions of steps that are alike."""


class Tried(NamedTuple):
    """f steps, by the places [f, k] before them and those that they were imagined to lead to."""

    before: Tensor
    after: Tensor

    @classmethod
    def of(cls, steps: Steps, surprise: float) -> Tried:
        """Steps that ended further than `surprise` from where they were imagined to, and those made a second time."""
        places = steps.places(steps.past)
        begins, ends = places[:-1], places[1:]
        if not len(steps.done):
            return cls(begins, begins)
        before = Moments(steps.past.states[:-1], steps.past.actions[:-1])
        imagined = steps.places(steps.step(before, torch.stack(list(steps.done))))
        repeats = (distances(begins, begins) < SAME) & (distances(ends, ends) < SAME)
        vain = ((imagined - ends).norm(dim=1) > surprise) | repeats.tril(-1).any(dim=1)
        return cls(begins[vain], imagined[vain])

    def forgotten(self) -> Tried:
        return Tried(self.before[:0], self.after[:0])

    def bars(self, before: Tensor, after: Tensor, radius: float) -> Tensor:
        """Steps between places [n, k] whose middle is within `radius` of one of these, in a like direction: bool [n]"""
        if not len(self.before):
            return torch.zeros(len(before), dtype=torch.bool)
        is_near = distances((before + after) / 2, (self.before + self.after) / 2) < radius
        directions = (after - before)[:, None], self.after - self.before
        return (is_near & (torch.cosine_similarity(*directions, dim=2) > ALIKE)).any(dim=1)


def distances(one: Tensor, other: Tensor) -> Tensor:
    """[n, k], [m, k] -> [n, m]"""
    return (one[:, None] - other).norm(dim=2)
