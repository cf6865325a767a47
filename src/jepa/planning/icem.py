"""Improved cross-entropy method (iCEM, Pinneri et al. 2020): coloured noise, kept elites, momentum, fewer samples."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from jepa.planning.sampling import begin, best, coloured
from jepa.planning.types import Search
from jepa.types import NonNegative, Positive, PositiveInt, Share, ShareBelowOne


class ICEM:
    """The best candidate that was seen.

    Noise has a power spectrum of frequency^-beta, the number of candidates is divided by `decay` in each iteration, a
    share `keep` of the elites is among the next candidates, and mean and deviation move by 1 - `momentum`.
    """

    def __init__(
        self, *, samples: PositiveInt = 128, iterations: PositiveInt = 6, elites: PositiveInt = 16,
        horizon: PositiveInt = 16, execute: PositiveInt = 4, std: Positive = 0.7, beta: NonNegative = 2.0,
        keep: Share = 0.3, momentum: ShareBelowOne = 0.1, decay: Positive = 1.25,
        warm_start: Literal["plan", "policy"] = "plan",
    ) -> None:  # fmt: skip
        if not 1 < elites <= samples:
            raise ValueError(f"planner.elites={elites}: must be at least 2 and at most planner.samples={samples}")
        self.samples, self.iterations, self.elites = samples, iterations, elites
        self.horizon, self.execute, self.warm_start = horizon, execute, warm_start
        self.std, self.beta, self.keep, self.momentum, self.decay = std, beta, keep, momentum, decay

    def __call__(self, search: Search) -> Tensor:
        mean = begin(search)
        std, kept = mean.new_full(mean.shape, self.std), mean[:, None]
        for iteration in range(self.iterations):
            count = max(2 * self.elites, round(self.samples / self.decay**iteration))
            noise = coloured(search.generators, self.beta, count, *mean.shape[1:])
            candidates = torch.cat([(mean[:, None] + std[:, None] * noise).clamp(-1, 1), kept, mean[:, None]], dim=1)
            elites = best(candidates, search.cost(candidates), self.elites)
            kept = elites[:, : max(1, round(self.keep * self.elites))]
            mean = self.momentum * mean + (1 - self.momentum) * elites.mean(dim=1)
            std = self.momentum * std + (1 - self.momentum) * elites.std(dim=1)
        return kept[:, 0]
