"""Batch normalisation over all ranks (Ioffe and Szegedy 2015), on any device."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from jepa.parallel.collectives import mean_over_ranks, world_size


class BatchNorm(nn.BatchNorm1d):
    """[B, D] -> [B, D]; torch's own on one process. torch's SyncBatchNorm supports only GPUs."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(input)
        with torch.autocast(input.device.type, enabled=False):
            values = input.float()
            mean = mean_over_ranks(values.mean(dim=0))
            variance = mean_over_ranks((values - mean).square().mean(dim=0))
            self._update_running(mean.detach(), variance.detach(), len(values) * world_size())
            return (values - mean) * (variance + self.eps).rsqrt() * self.weight + self.bias

    @torch.no_grad()
    def _update_running(self, mean: Tensor, variance: Tensor, count: int) -> None:
        """Updates the running statistics, with the unbiased variance as in torch."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.momentum is not None
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * count / max(1, count - 1), self.momentum)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
