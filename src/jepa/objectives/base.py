"""Base class of the objectives, with defaults for their optional attributes."""

from __future__ import annotations

from collections.abc import Iterable, Set
from typing import Any

import torch
from torch import Tensor, nn

from jepa.parallel.strategy import local_shards
from jepa.types import Batch, Latents, Masks, Regularizer


def update_average(average: Iterable[Tensor], online: Iterable[Tensor], momentum: float) -> None:
    """EMA update of the parameters `average`, in place."""
    torch._foreach_lerp_(local_shards(average), local_shards(online), 1 - momentum)  # pyright: ignore


class Objective(nn.Module):
    """A model together with its loss: the one module that is compiled and distributed.

    A subclass has `encoder`, or another `backbone`, and `forward(batch, masks)` returning a LossOutput. One with a
    `regularization` also takes a third argument of `forward`, the gradient cache.
    """

    encoder: Any
    regularizers: Any
    needs: Set[str] = frozenset()
    """Fields of the data set that the loss reads; "labels" if it learns labels."""
    uses: Set[str] = frozenset()
    """Fields that the loss reads too if the data set has them."""
    may_leave_parameters_idle: Any = False
    """True if some parameters may get no gradient (DDP then needs find_unused_parameters)."""
    classify: Any = None
    """Method [b, N, D] -> [b, classes] of an objective whose head learns labels."""
    detect: Any = None
    """Method [B, C, 1, H, W] -> list of float32 [n, 6] (edges, class, score) of an objective that detects boxes."""

    @property
    def backbone(self) -> nn.Module:
        """The encoder that is probed, tuned and exported."""
        return self.encoder

    @property
    def regularization(self) -> Regularizer | None:
        """The penalty on latents, computed over the whole batch also with micro-batches; None without one."""
        return self.penalty if getattr(self, "regularizers", None) else None

    def penalty(self, latents: Latents) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of all `regularizers`, an nn.ModuleDict, and each of their terms by name, detached."""
        parts = {name: regularizer(latents) for name, regularizer in self.regularizers.items()}
        total = torch.stack([value for value, _ in parts.values()]).sum()
        terms = {f"{name}_{term}": value for name, (_, values) in parts.items() for term, value in values.items()}
        return total, {"regularizer": total.detach(), **terms}

    @property
    def contract(self) -> dict[str, Any]:
        """What a later user of the model must know besides its encoder, for the checkpoint; empty if nothing."""
        return {}

    def lr_scales(self) -> dict[str, float]:
        """Parameter name -> factor of its learning rate; missing names have 1."""
        return {}

    def after_step(self, step: int) -> dict[str, float]:
        """Updates weights without gradient after optimizer step `step` (from 0); returns schedule values to log."""
        return {}

    def diagnose(self, batch: Batch, masks: Masks) -> dict[str, Tensor]:
        """Scalars that show whether the method works, e.g. the prediction error and that of a trivial predictor."""
        return {}

    def pictures(self, batch: Batch, masks: Masks) -> dict[str, Tensor]:
        """Predictions as normalised clips [b, C, T, H, W] by name; none if the objective predicts latents."""
        return {}
