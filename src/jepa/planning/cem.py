"""Cross-entropy method (Rubinstein 1999): refit a Gaussian to the best candidates, several times."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from jepa.planning.sampling import begin, best, normal
from jepa.planning.types import Search
from jepa.types import NonNegative, Positive, PositiveInt


class CEM:
    """The mean of the last distribution; the mean of each iteration is one of the next one's candidates."""

    def __init__(
        self, *, samples: PositiveInt = 128, iterations: PositiveInt = 6, elites: PositiveInt = 16,
        horizon: PositiveInt = 16, execute: PositiveInt = 4, std: Positive = 0.7, min_std: NonNegative = 0.05,
        warm_start: Literal["plan", "policy"] = "plan",
    ) -> None:  # fmt: skip
        if not 1 < elites <= samples:
            raise ValueError(f"planner.elites={elites}: must be at least 2 and at most planner.samples={samples}")
        self.samples, self.iterations, self.elites = samples, iterations, elites
        self.horizon, self.execute, self.warm_start = horizon, execute, warm_start
        self.std, self.min_std = std, min_std

    def __call__(self, search: Search) -> Tensor:
        mean = begin(search)
        std = mean.new_full(mean.shape, self.std)
        for _ in range(self.iterations):
            noise = normal(search.generators, self.samples, *mean.shape[1:])
            candidates = (mean[:, None] + std[:, None] * noise).clamp(-1, 1)
            candidates[:, 0] = mean
            elites = best(candidates, search.cost(candidates), self.elites)
            mean, std = elites.mean(dim=1), elites.std(dim=1).clamp(min=self.min_std)
        return mean
