"""Planning by gradient descent through the world model, from several starts."""

from __future__ import annotations

import torch
from torch import Tensor

from jepa.planning.sampling import begin, best, normal
from jepa.planning.types import Search
from jepa.types import Positive, PositiveInt


class GradientPlanner:
    """Adam on `starts` plans at once, clipped to the bounds after each step; the best plan that was seen."""

    def __init__(
        self, *, starts: PositiveInt = 8, iterations: PositiveInt = 30, lr: Positive = 0.1, std: Positive = 0.5,
        horizon: PositiveInt = 16, execute: PositiveInt = 4,
    ) -> None:  # fmt: skip
        self.starts, self.iterations, self.lr, self.std = starts, iterations, lr, std
        self.horizon, self.execute = horizon, execute

    def __call__(self, search: Search) -> Tensor:
        mean = begin(search)
        noise = normal(search.generators, self.starts, *mean.shape[1:])
        noise[:, 0] = 0
        plans = (mean[:, None] + self.std * noise).clamp(-1, 1).requires_grad_()
        optimizer = torch.optim.Adam([plans], lr=self.lr)
        winner, least = mean, mean.new_full((len(mean),), torch.inf)
        for _ in range(self.iterations + 1):
            with torch.enable_grad():
                costs = search.cost(plans)
                (plans.grad,) = torch.autograd.grad(costs.sum(), plans)
            better = costs.detach().amin(dim=1) < least
            winner = torch.where(better[:, None, None], best(plans.detach(), costs.detach(), 1)[:, 0], winner)
            least = torch.minimum(least, costs.detach().amin(dim=1))
            optimizer.step()
            with torch.no_grad():
                plans.clamp_(-1, 1)
        return winner
