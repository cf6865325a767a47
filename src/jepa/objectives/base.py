"""What every objective has, with the defaults of what it need not have."""

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
    """whether some parameters may get no gradient (DDP then needs find_unused_parameters)"""
    classify: Any = None
    """[b, N, D] of the backbone -> [b, classes], where there is a head that is trained on labels"""
    find: Any = None
    """[B, C, 1, H, W] -> of each picture float32 [n, 6] (edges, class, score), where boxes are detected"""

    @property
    def regularization(self) -> Regularizer | None:
        """The penalty on latents, which micro-batches compute together over the whole batch; None without one."""
        return None

    def lr_scales(self) -> dict[str, float]:
        """Parameter name -> its share of the learning rate, where that is not 1."""
        return {}

    def after_step(self, step: int) -> dict[str, float]:
        """Update what no gradient reaches, after optimizer step `step` (from 0); returns schedule values to log."""
        return {}

    def diagnose(self, batch: Batch, masks: Masks) -> dict[str, Tensor]:
        """Scalars that tell whether the method works, e.g. prediction error against the trivial predictor."""
        return {}

    def pictures(self, batch: Batch, masks: Masks) -> dict[str, Tensor]:
        """Normalised clips [b, C, T, H, W] that show what is predicted, by name; none where that is latents."""
        return {}
