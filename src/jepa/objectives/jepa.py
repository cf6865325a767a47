"""Joint embedding predictive architecture (I-JEPA, Assran et al. 2023): predict a momentum encoder's latents."""

from __future__ import annotations

from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa.layers.tokens import take
from jepa.schedules import linear
from jepa.types import Batch, LossOutput, Masks

LOSSES = {"mse": F.mse_loss, "smooth_l1": F.smooth_l1_loss, "l1": F.l1_loss}


class JEPA(nn.Module):
    """The context encoder and the predictor learn to tell what the target encoder says of the hidden tokens.

    The target encoder follows the context encoder with a momentum that goes linearly from `momentum` to
    `final_momentum`. Both are meant for batches of `momentum_batch_size`: another `batch_size` keeps the half-life in
    samples.
    """

    def __init__(
        self,
        *,
        encoder: nn.Module,
        predictor: nn.Module,
        regularizer: nn.Module | None = None,
        loss: str = "mse",
        momentum: float = 0.996,
        final_momentum: float = 1.0,
        momentum_batch_size: int = 64,
        batch_size: int,
        total_steps: int,
    ) -> None:
        super().__init__()
        if loss not in LOSSES:
            raise ValueError(f"objective.loss={loss} is not one of {', '.join(LOSSES)}")
        if not 0 <= momentum <= final_momentum <= 1:
            raise ValueError(
                f"0 <= objective.momentum={momentum} <= objective.final_momentum={final_momentum} <= 1 must hold"
            )
        if min(momentum_batch_size, batch_size, total_steps) < 1:
            raise ValueError(
                f"momentum_batch_size={momentum_batch_size}, batch_size={batch_size} and steps={total_steps} "
                "must be at least 1"
            )
        self.loss = LOSSES[loss]
        self.momentum = momentum
        self.final_momentum = final_momentum
        self.batch_ratio = batch_size / momentum_batch_size
        self.total_steps = total_steps
        self.context_encoder = encoder
        self.target_encoder = deepcopy(encoder).requires_grad_(False).eval()
        self.predictor = predictor
        self.regularizer = regularizer

    @property
    def backbone(self) -> nn.Module:
        """The target encoder: the average of its followed weights is the better representation."""
        return self.target_encoder

    def train(self, mode: bool = True) -> JEPA:
        """The target encoder never drops a path: it stays in evaluation mode."""
        super().train(mode)
        self.target_encoder.eval()
        return self

    def forward(self, batch: Batch, masks: Masks) -> LossOutput:
        targets = self.targets(batch.clips, masks)
        context = self.context_encoder(batch.clips, keep=masks.context)
        predictions = self.predictor(context, masks).float()
        loss = self.loss(predictions, targets)
        embedding = context.float().mean(dim=1)  # [B, D]
        metrics = {"prediction": loss.detach()}
        if self.regularizer is not None:
            penalty, terms = self.regularizer(embedding)
            metrics |= {"regularizer": penalty.detach(), **terms}
            loss = loss + penalty
        return LossOutput(loss, metrics, embedding.detach())

    @torch.no_grad()
    def targets(self, clips: Tensor, masks: Masks) -> Tensor:
        """[B, C, T, H, W] -> float32 [B, M, J, D]: the target encoder's tokens, each normalised over its width."""
        hidden = take(self.target_encoder(clips), masks.targets).float()
        return F.layer_norm(hidden, hidden.shape[-1:])

    def momentum_at(self, step: int) -> float:
        """Momentum of the update that follows optimizer step `step` (from 0)."""
        return linear(step, self.total_steps, self.momentum, self.final_momentum) ** self.batch_ratio

    @torch.no_grad()
    def after_step(self, step: int) -> dict[str, float]:
        """The target encoder takes a small step towards the context encoder."""
        momentum = self.momentum_at(step)
        target, source = self.target_encoder, self.context_encoder
        torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
            list(target.parameters()), list(source.parameters()), 1 - momentum
        )
        for kept, current in zip(target.buffers(), source.buffers(), strict=True):
            kept.copy_(current)
        return {"momentum": momentum}

    @torch.no_grad()
    def diagnose(self, batch: Batch, masks: Masks) -> dict[str, Tensor]:
        """Squared error of the prediction and of the best constant one (the mean target), and the targets' std."""
        training = self.training
        self.eval()
        targets = self.targets(batch.clips, masks)
        predictions = self.predictor(self.context_encoder(batch.clips, keep=masks.context), masks).float()
        self.train(training)
        mean = targets.mean(dim=(0, 1, 2))  # [D]
        return {
            "error": F.mse_loss(predictions, targets),
            "trivial_error": (targets - mean).square().mean(),
            "target_std": targets.flatten(0, 2).std(dim=0).mean(),
        }
