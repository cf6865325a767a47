"""SIGReg (LeJEPA, Balestriero & LeCun 2025): every projection of the latents should be Gaussian."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa.parallel.collectives import mean_over_ranks, same_on_all_ranks
from jepa.regularizers.pooling import pool_views
from jepa.types import Latents, NonNegative, PositiveInt

NUM_KNOTS, LAST_KNOT = 17, 3.0
"""Quadrature points on [0, 3]; the integrand is even."""


class SIGReg(nn.Module):
    """Epps-Pulley distance of the pooled latents from a standard normal, along random directions new at each call.

    Along a direction it is the integral over t of |empirical characteristic function - exp(-t^2/2)|^2 exp(-t^2/2), by
    the trapezoid rule on [-3, 3]. The mean over directions and views is 0.40 if all samples are at the origin, 1.26 if
    they are far apart and about 1.06 / N for N samples of a standard normal. The paper multiplies it by N: its weight
    of 0.05 is 0.05 N here, where a weight means the same for any batch size and number of ranks.
    """

    def __init__(
        self, *, of: Literal["context", "predicted"] = "context", weight: NonNegative = 1.0,
        num_slices: PositiveInt = 1024,
    ) -> None:  # fmt: skip
        super().__init__()
        self.of = of
        self.weight = weight
        self.num_slices = num_slices
        knots = torch.linspace(0, LAST_KNOT, NUM_KNOTS)
        normal = (-knots.square() / 2).exp()
        trapezoid = torch.full_like(knots, 2 * LAST_KNOT / (NUM_KNOTS - 1))  # both signs of t
        trapezoid[[0, -1]] /= 2
        self.knots = nn.Buffer(knots, persistent=False)
        self.normal = nn.Buffer(normal, persistent=False)
        self.weights = nn.Buffer(trapezoid * normal, persistent=False)

    def forward(self, latents: Latents) -> tuple[Tensor, dict[str, Tensor]]:
        """-> float32 scalar, and the unweighted statistic, detached"""
        with torch.autocast(latents.context.device.type, enabled=False):
            views = pool_views(latents, self.of)  # [b, V, D]
            directions = torch.randn(self.num_slices, views.shape[-1], device=views.device)
            statistic = self.statistic(views, same_on_all_ranks(F.normalize(directions, dim=1)))
            return self.weight * statistic, {"statistic": statistic.detach()}

    def statistic(self, views: Tensor, directions: Tensor) -> Tensor:
        """[b, V, D], [S, D] -> mean over views and directions for the samples on all ranks"""
        phase = (views @ directions.T)[..., None] * self.knots  # [b, V, S, knots]
        moments = mean_over_ranks(torch.stack([phase.cos().mean(dim=0), phase.sin().mean(dim=0)]))
        distance = (moments[0] - self.normal).square() + moments[1].square()  # [V, S, knots]
        return (distance @ self.weights).mean()
