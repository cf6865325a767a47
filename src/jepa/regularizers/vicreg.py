"""Variance and covariance terms of VICReg (Bardes et al. 2022, equations 1 to 4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPSILON = 1e-4


class VICReg(nn.Module):
    """Keeps every dimension of a batch of embeddings spread out and uncorrelated with the others.

    Convention of the paper: variances and covariances divide by B - 1; the variance term is the mean over the D
    dimensions of relu(1 - sqrt(var + 1e-4)), the covariance term the sum of squared off-diagonal covariances divided
    by D (not by D (D - 1)). The paper's weights 25 and 1 have the ratio of the defaults. The batch is what this process
    holds.
    """

    def __init__(self, *, variance: float = 1.0, covariance: float = 0.04) -> None:
        super().__init__()
        if min(variance, covariance) < 0:
            raise ValueError(f"regularizer weights must be at least 0, got variance={variance} covariance={covariance}")
        self.variance = variance
        self.covariance = covariance

    def forward(self, embeddings: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """[B, D] -> float32 scalar, and its two terms before weighting, detached"""
        if embeddings.shape[0] < 2:
            raise ValueError(
                "VICReg needs at least 2 samples in a batch on each device: raise batch_size or micro_batch_size"
            )
        with torch.autocast(
            embeddings.device.type, enabled=False
        ):  # a bfloat16 product would lose the small covariances
            centred = embeddings.float() - embeddings.float().mean(dim=0)
            covariance = centred.T @ centred / (len(centred) - 1)  # [D, D]
            variances = covariance.diagonal()
            variance_loss = F.relu(1 - (variances + EPSILON).sqrt()).mean()
            covariance_loss = (covariance.square().sum() - variances.square().sum()) / len(variances)
            loss = self.variance * variance_loss + self.covariance * covariance_loss
        return loss, {"variance": variance_loss.detach(), "covariance": covariance_loss.detach()}
