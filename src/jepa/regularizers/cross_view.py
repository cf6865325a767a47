"""Consistency of the views of a sample (LeJEPA, Balestriero & LeCun 2025, prediction term)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from jepa.regularizers.pooling import mean_counted, pool_steps, pool_views
from jepa.types import Latents, NonNegative


class CrossView(nn.Module):
    """Mean squared distance, over D, of the pooled latents of views from the mean of the views of their sample.

    Views are the `augment.views` crops of a sample, or the time steps of a clip that have tokens. Samples with a single
    such step do not count; without any other, e.g. in a batch of images, the penalty is 0. The `augment.local_views`
    smaller crops are compared with the mean of the others, but are no part of it.
    """

    rules = ("jepa.regularizers.rules.cross_view",)

    def __init__(
        self, *, of: Literal["context", "predicted"] = "context", between: Literal["crops", "frames"] = "crops",
        weight: NonNegative = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.of = of
        self.between = between
        self.weight = weight

    def forward(self, latents: Latents) -> tuple[Tensor, dict[str, Tensor]]:
        """-> float32 scalar, and the unweighted distance, detached"""
        with torch.autocast(latents.context.device.type, enabled=False):
            views, counts = self.views(latents)
            centre = counts.clone()
            if self.between == "crops":
                centre[:, latents.views :] = 0
            mean = (views * centre[..., None]).sum(dim=1, keepdim=True) / centre.sum(dim=1).clamp(min=1)[:, None, None]
            squares = (views - mean).square().mean(dim=-1)  # [B, V]
            distance = mean_counted(squares, counts)
        return self.weight * distance, {"distance": distance.detach()}

    def views(self, latents: Latents) -> tuple[Tensor, Tensor]:
        """-> [B, V, D] and [B, V], 1 for a view that counts and 0 otherwise"""
        if self.between == "crops":
            if latents.views < 2 and latents.local is None:
                raise ValueError(
                    "regularizer.cross_view compares crops of a sample: set augment.views to 2 or more, "
                    "or regularizer.cross_view.between=frames"
                )
            views = pool_views(latents, self.of)
            return views, torch.ones_like(views[..., 0])
        steps, has_tokens = pool_steps(latents, self.of)
        return steps, (has_tokens & (has_tokens.sum(dim=1, keepdim=True) > 1)).to(steps.dtype)
