"""Joint embedding predictive architecture (I-JEPA, Assran et al. 2023): predict a momentum encoder's latents."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa.layers.tokens import gather_tokens
from jepa.layers.transformer import last_layers
from jepa.objectives.base import Objective, update_average
from jepa.schedules import linear
from jepa.types import Batch, Latents, LossOutput, Masks, NonNegative, PatchGrid, PositiveInt, Share

LOSSES = {"mse": F.mse_loss, "smooth_l1": F.smooth_l1_loss, "l1": F.l1_loss}


class JEPA(Objective):
    """The context encoder and the predictor learn to predict the target encoder's tokens at the hidden positions.

    With `target=ema` the target encoder is an average of the context encoder whose momentum grows linearly from
    `momentum` to `final_momentum`. Both hold for a batch size of `momentum_batch_size`; another `batch_size` keeps the
    half-life in samples. With `stopgrad` the context encoder computes the targets without gradient (SimSiam, Chen and
    He 2021), with `none` with gradient, and only regularisers prevent its collapse (VICReg, LeJEPA). With several mask
    sets for each sample the losses of the sets are averaged (V-JEPA, Bardes et al. 2024). Where masks hide nothing, the
    regularisers are the whole loss: they compare views (LeJEPA, Balestriero and LeCun 2025). `context_weight` adds the
    prediction loss on the context tokens, which only the joint predictor has: the context loss of V-JEPA 2.1
    (Mur-Labadia et al. 2026), but with equal weights for all tokens and from the first step on. The targets are the
    mean of the last `target_layers` blocks, each normalised over its width (data2vec, Baevski et al. 2022, section
    3.3). With `target_view=other` a crop predicts the hidden tokens of the next crop of the same sample.
    """

    predicts = "latents"
    rules = ("jepa.objectives.rules.jepa",)

    def __init__(
        self, *, encoder: nn.Module, predictor: nn.Module, regularizers: Mapping[str, nn.Module] | None = None,
        loss: Literal["mse", "smooth_l1", "l1"] = "mse", target: Literal["ema", "stopgrad", "none"] = "ema",
        context_weight: NonNegative = 0.0, target_layers: PositiveInt = 1,
        target_view: Literal["same", "other"] = "same", momentum: Share = 0.996, final_momentum: Share = 1.0,
        momentum_batch_size: PositiveInt = 64, batch_size: PositiveInt, total_steps: PositiveInt,
    ) -> None:  # fmt: skip
        super().__init__()
        if context_weight and not getattr(predictor, "joint", False):
            raise ValueError(f"objective.context_weight={context_weight} needs predictor=transformer, joint=true")
        if target_layers > 1 and target_layers > len(getattr(encoder, "blocks", ())):
            blocks = len(getattr(encoder, "blocks", ()))
            raise ValueError(f"objective.target_layers={target_layers}: the encoder has {blocks} blocks")
        if momentum > final_momentum:
            raise ValueError(f"objective.momentum={momentum} must not exceed objective.final_momentum={final_momentum}")
        self.loss = LOSSES[loss]
        self.target = target
        self.context_weight = context_weight
        self.target_layers = target_layers
        self.target_view = target_view
        self.momentum = momentum
        self.final_momentum = final_momentum
        self.batch_ratio = batch_size / momentum_batch_size
        self.total_steps = total_steps
        self.context_encoder: Any = encoder
        self.target_encoder = deepcopy(encoder).requires_grad_(False).eval() if target == "ema" else None
        self.predictor = predictor
        self.regularizers = nn.ModuleDict(regularizers)

    @property
    def backbone(self) -> nn.Module:
        """The target encoder if there is one: the EMA weights usually probe better than the online ones."""
        return self.context_encoder if self.target_encoder is None else self.target_encoder

    @property
    def may_leave_parameters_idle(self) -> bool:
        """True if no regulariser reads the predictions, so that the predictor may get no gradient."""
        return {getattr(regularizer, "of", "predicted") for regularizer in self.regularizers.values()} == {"context"}

    def train(self, mode: bool = True) -> JEPA:
        """The target encoder stays in evaluation mode: it drops no path."""
        super().train(mode)
        if self.target_encoder is not None:
            self.target_encoder.eval()
        return self

    def forward(self, batch: Batch, masks: Masks, grad_cache: Any = None) -> LossOutput:
        """`grad_cache` replaces the regularisers if the batch is a micro-batch (training/gradient_cache.py)."""
        grid, hides = self.context_encoder.grid_of(batch.clips), masks.hides_some
        is_recording = grad_cache is not None and grad_cache.is_recording
        target_tokens = self.encode_targets(batch.clips) if hides and not is_recording else None
        if target_tokens is not None and self.target_view == "other":
            target_tokens = target_tokens.unflatten(0, (-1, batch.views)).roll(-1, dims=1).flatten(0, 1)
        losses, metrics, embedding = [], {}, None
        for number, mask in enumerate(masks.sets):
            context = self.context_encoder(batch.clips, keep=mask.context if hides else None)
            context_predictions, predictions = self.predict(context, mask, grid, number)
            embedding = context.float().mean(dim=1) if embedding is None else embedding  # [B, D]
            parts, terms = [], {}
            if target_tokens is not None:
                parts.append(self.loss(predictions, self.targets(target_tokens, mask)))
                terms["prediction"] = parts[0].detach()
            if target_tokens is not None and context_predictions is not None:
                at_context = mask._replace(targets=mask.context.unsqueeze(1))
                distance = self.loss(context_predictions, self.targets(target_tokens, at_context).squeeze(1))
                parts.append(self.context_weight * distance)
                terms["context_prediction"] = distance.detach()
            if self.regularizers:
                local = self.local_latents(batch, mask)
                latents = Latents(context, predictions, mask, grid, batch.views, local)
                penalty, penalties = self.penalty(latents) if grad_cache is None else grad_cache(number, latents)
                parts.append(penalty)
                terms |= penalties
            losses.append(torch.stack(parts).sum())
            metrics |= {name: metrics.get(name, 0) + value / len(masks.sets) for name, value in terms.items()}
        assert embedding is not None
        return LossOutput(torch.stack(losses).mean(), metrics, embedding.detach())

    def predict(self, context: Tensor, mask: Masks, grid: PatchGrid, number: int) -> tuple[Tensor | None, Tensor]:
        """[B, K, D] -> float32 [B, K, D] of the context tokens (None without `context_weight`), [B, M, J, D]."""
        if not (self.context_weight and mask.hides_some):
            return None, self.predictor(context, mask, grid, number).float()
        both = self.predictor(context, mask, grid, number, predict_context=True).float()
        context_predictions, predictions = both.tensor_split([context.shape[1]], dim=1)
        return context_predictions, predictions.unflatten(1, mask.targets.shape[1:])

    def local_latents(self, batch: Batch, masks: Masks) -> Latents | None:
        """Latents of the local crops, None without any; only used if the masks hide nothing."""
        if batch.local is None:
            return None
        grid, context = self.context_encoder.grid_of(batch.local), self.context_encoder(batch.local)
        num_views = len(batch.local) * batch.views // len(batch.clips)
        return Latents(context, self.predictor(context, masks, grid).float(), masks, grid, num_views)

    def encode_targets(self, clips: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, N, D]: the target encoder's tokens, with gradient only for target=none."""
        with torch.set_grad_enabled(self.target == "none" and torch.is_grad_enabled()):
            if self.target_layers == 1:
                return self.backbone(clips)
            layers = last_layers(self.backbone, clips, self.target_layers)
            return torch.stack([F.layer_norm(tokens.float(), tokens.shape[-1:]) for tokens in layers]).mean(dim=0)

    def targets(self, target_tokens: Tensor, masks: Masks) -> Tensor:
        """[B, N, D] -> float32 [B, M, J, D]: the tokens at the target positions, each normalised over its width."""
        hidden = gather_tokens(target_tokens, masks.targets).float()
        return F.layer_norm(hidden, hidden.shape[-1:])

    def momentum_at(self, step: int) -> float:
        """Momentum of the update that follows optimizer step `step` (from 0)."""
        return linear(step, self.total_steps, self.momentum, self.final_momentum) ** self.batch_ratio

    @torch.no_grad()
    def after_step(self, step: int) -> dict[str, float]:
        """EMA update of the target encoder, if there is one."""
        target, source = self.target_encoder, self.context_encoder
        if target is None:
            return {}
        momentum = self.momentum_at(step)
        update_average(target.parameters(), source.parameters(), momentum)
        for average, current in zip(target.buffers(), source.buffers(), strict=True):
            average.copy_(current)
        return {"momentum": momentum}

    @torch.no_grad()
    def diagnose(self, batch: Batch, masks: Masks) -> dict[str, Tensor]:
        """Squared error of the prediction and of the best constant (the mean target), and the targets' std.

        For targets in the future also the error of copying the last visible step, and all three by horizon. Empty if
        the masks hide nothing, or the targets are those of another crop.
        """
        if not masks.hides_some or self.target_view == "other":
            return {}
        training = self.training
        self.eval()
        grid, tokens = self.context_encoder.grid_of(batch.clips), self.encode_targets(batch.clips)
        parts = [self._diagnose(batch.clips, tokens, mask, grid, number) for number, mask in enumerate(masks.sets)]
        self.train(training)
        return {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}

    def _diagnose(self, clips: Tensor, tokens: Tensor, masks: Masks, grid: PatchGrid, number: int) -> dict[str, Tensor]:
        targets = self.targets(tokens, masks)
        predictions = self.predictor(self.context_encoder(clips, keep=masks.context), masks, grid, number).float()
        mean = targets.mean(dim=(0, 1, 2))  # [D]
        errors = {
            "error": F.mse_loss(predictions, targets),
            "trivial_error": (targets - mean).square().mean(),
            "target_std": targets.flatten(0, 2).std(dim=0).mean(),
        }
        copies = self._copies(tokens, masks, grid)
        if copies is None:
            return errors
        errors["copy_error"] = F.mse_loss(copies, targets)
        for block in range(targets.shape[1]):
            future, horizon = targets[:, block], f"h{block + 1}"
            errors[f"error_{horizon}"] = F.mse_loss(predictions[:, block], future)
            errors[f"copy_error_{horizon}"] = F.mse_loss(copies[:, block], future)
            errors[f"trivial_error_{horizon}"] = (future - future.mean(dim=(0, 1))).square().mean()
        return errors

    def _copies(self, target_tokens: Tensor, masks: Masks, grid: PatchGrid) -> Tensor | None:
        """[B, N, D] -> [B, M, J, D]: the last visible step copied to the targets; None if they do not follow it."""
        num_patches = grid.h * grid.w
        last = masks.context.amax(dim=1)[:, None, None] // num_patches  # [B, 1, 1]
        if grid.t == 1 or bool((masks.targets // num_patches <= last).any()):
            return None
        return self.targets(target_tokens, masks._replace(targets=last * num_patches + masks.targets % num_patches))
