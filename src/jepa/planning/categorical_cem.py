"""Cross-entropy method for discrete actions: refit the probabilities of each action in each step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from jepa.planning.sampling import best, uniform
from jepa.planning.types import Search
from jepa.types import PositiveInt, ShareBelowOne


class CategoricalCEM:
    """The best candidate that was seen; probabilities move by 1 - `momentum` and stay above a floor."""

    is_discrete = True

    def __init__(
        self, *, samples: PositiveInt = 128, iterations: PositiveInt = 6, elites: PositiveInt = 16,
        horizon: PositiveInt = 16, execute: PositiveInt = 1, momentum: ShareBelowOne = 0.1, floor: ShareBelowOne = 0.02,
    ) -> None:  # fmt: skip
        if elites > samples:
            raise ValueError(f"planner.elites={elites}: must be at most planner.samples={samples}")
        self.samples, self.iterations, self.elites = samples, iterations, elites
        self.horizon, self.execute = horizon, execute
        self.momentum, self.floor = momentum, floor

    def __call__(self, search: Search) -> Tensor:
        shape = (len(search.generators), search.horizon, search.size, search.num_actions)
        probabilities = torch.full(shape, 1 / search.num_actions)
        kept = search.warm_start
        for _ in range(self.iterations):
            thresholds = uniform(search.generators, self.samples, *shape[1:3])[..., None]
            edges = probabilities.cumsum(dim=-1)[:, None, ..., :-1]
            candidates = (thresholds >= edges).sum(dim=-1)  # [B, N, H, block]
            candidates = candidates if kept is None else torch.cat([candidates, kept[:, None]], dim=1)
            elites = best(candidates, search.cost(candidates), self.elites)
            kept = elites[:, 0]
            shares = F.one_hot(elites, search.num_actions).float().mean(dim=1)
            probabilities = self.momentum * probabilities + (1 - self.momentum) * shares
            probabilities = probabilities.clamp(min=self.floor)
            probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
        assert kept is not None
        return kept
