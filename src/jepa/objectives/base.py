"""Base class of the objectives, with defaults for their optional attributes."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

from torch import Tensor, nn

from jepa.types import Batch, Masks, Regularizer


class Objective(nn.Module):
    """A model together with its loss: the one module that is compiled and distributed.

    A subclass has `backbone`, the encoder that is probed, tuned and exported, and `forward(batch, masks)` returning a
    LossOutput. One with a `regularization` also takes a third argument of `forward`, the cache of gradients.
    """

    needs: Set[str] = frozenset()
    """fields of the data set that the loss reads; "labels" where labels are learned"""
    may_leave_parameters_idle: Any = False
    """True if some parameters may get no gradient (DDP then needs find_unused_parameters)"""
    classify: Any = None
    """method [b, N, D] -> [b, classes] of an objective whose head learns labels"""
    find: Any = None
    """method [B, C, 1, H, W] -> list of float32 [n, 6] (edges, class, score) of an objective that detects boxes"""

    @property
    def regularization(self) -> Regularizer | None:
        """The penalty on latents, which micro-batches compute together over the whole batch; None without one."""
        return None

    def lr_scales(self) -> dict[str, float]:
        """Parameter name -> factor of its learning rate, where that is not 1."""
        return {}

    def after_step(self, step: int) -> dict[str, float]:
        """Updates weights without gradient after optimizer step `step` (from 0); returns schedule values to log."""
        return {}

    def diagnose(self, batch: Batch, masks: Masks) -> dict[str, Tensor]:
        """Scalars that show whether the method works, e.g. the prediction error beside that of a trivial predictor."""
        return {}

    def pictures(self, batch: Batch, masks: Masks) -> dict[str, Tensor]:
        """Normalised clips [b, C, T, H, W] by name that show predictions; none where latents are predicted."""
        return {}
