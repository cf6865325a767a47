"""Variance, invariance and covariance terms of VICReg (Bardes et al. 2022, equations 1 to 6)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa.parallel.collectives import mean_over_ranks, sum_over_ranks, world_size
from jepa.regularizers.pooling import pool_views
from jepa.types import Latents, NonNegative

EPSILON = 1e-4


class VICReg(nn.Module):
    """Keeps every dimension of the pooled latents spread out and uncorrelated with the others.

    As in the paper, variances and covariances divide by B - 1; the variance term is the mean over the D dimensions of
    relu(1 - sqrt(var + 1e-4)), the covariance term the sum of squared off-diagonal covariances divided by D. Both are
    computed per view, local ones included, and averaged. The invariance term is the mean over samples, pairs of views
    and dimensions of the squared difference (equation 5 divided by D, as in the authors' code). The paper's weights 25,
    1 and 25 have the ratio of 1, 0.04 and 1. The batch consists of the samples on all ranks.
    """

    rules = ("jepa.regularizers.rules.vicreg",)

    def __init__(
        self, *, of: Literal["context", "predicted"] = "context", variance: NonNegative = 1.0,
        covariance: NonNegative = 0.04, invariance: NonNegative = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.of = of
        self.variance = variance
        self.covariance = covariance
        self.invariance = invariance

    def forward(self, latents: Latents) -> tuple[Tensor, dict[str, Tensor]]:
        """-> float32 scalar, and its unweighted terms, detached"""
        # a bfloat16 product would lose the small covariances
        with torch.autocast(latents.context.device.type, enabled=False):
            views = pool_views(latents, self.of)  # [b, V, D]
            variance, covariance = torch.stack([torch.stack(spread(view)) for view in views.unbind(1)]).mean(dim=0)
            loss = self.variance * variance + self.covariance * covariance
            terms = {"variance": variance, "covariance": covariance}
            if self.invariance:
                terms["invariance"] = difference(views)
                loss = loss + self.invariance * terms["invariance"]
        return loss, {name: term.detach() for name, term in terms.items()}


def spread(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """[b, D] -> variance and covariance term of the embeddings on all ranks"""
    count = len(embeddings) * world_size()
    if count < 2:
        raise ValueError("VICReg needs at least 2 samples at a time: raise batch_size or micro_batch_size")
    centred = embeddings - mean_over_ranks(embeddings.mean(dim=0))
    covariance = sum_over_ranks(centred.T @ centred) / (count - 1)  # [D, D]
    variances = covariance.diagonal()
    variance_loss = F.relu(1 - (variances + EPSILON).sqrt()).mean()
    return variance_loss, (covariance.square().sum() - variances.square().sum()) / len(variances)


def difference(views: Tensor) -> Tensor:
    """[b, V, D] -> mean squared difference over all pairs of views, which is twice their variance"""
    if views.shape[1] < 2:
        raise ValueError("the invariance term of VICReg compares views of a sample: set augment.views to 2 or more")
    return 2 * views.var(dim=1).mean()
