"""Model predictive path integral control (Williams et al. 2017): the average of candidates, weighted by cost."""

from __future__ import annotations

from torch import Tensor

from jepa.planning.sampling import begin, normal
from jepa.planning.types import Search
from jepa.types import Positive, PositiveInt, PositiveShare


class MPPI:
    """Weights are exp(-(cost - least cost) / temperature), with costs in standard deviations of the candidates' costs.

    The deviation of the noise shrinks by `shrink` from one iteration to the next.
    """

    def __init__(
        self, *, samples: PositiveInt = 128, iterations: PositiveInt = 6, horizon: PositiveInt = 16,
        execute: PositiveInt = 4, std: Positive = 0.7, shrink: PositiveShare = 0.7, temperature: Positive = 0.2,
    ) -> None:  # fmt: skip
        self.samples, self.iterations = samples, iterations
        self.horizon, self.execute = horizon, execute
        self.std, self.shrink, self.temperature = std, shrink, temperature

    def __call__(self, search: Search) -> Tensor:
        mean, std = begin(search), self.std
        for _ in range(self.iterations):
            noise = normal(search.generators, self.samples, *mean.shape[1:])
            candidates = (mean[:, None] + std * noise).clamp(-1, 1)
            candidates[:, 0] = mean
            costs = search.cost(candidates)
            spread = costs.std(dim=1, keepdim=True, correction=0).clamp(min=1e-6)
            scaled = (costs - costs.amin(dim=1, keepdim=True)) / spread
            weights = (-scaled / self.temperature).softmax(dim=1)
            mean, std = (weights[:, :, None, None] * candidates).sum(dim=1), std * self.shrink
        return mean
