"""Masked autoencoder (He et al. 2022): predict the pixels of what is hidden."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from jepa.layers.decoder import PixelDecoder
from jepa.layers.tokens import patchify_pixels, token_extent, unpatchify
from jepa.objectives.base import Objective
from jepa.types import Batch, LossOutput, Masks, PositiveInt

EPSILON = 1e-6


class MAE(Objective):
    """The encoder sees the context tokens; a light decoder predicts every other patch.

    The loss is the squared error of the hidden patches' pixels; `normalize_patches` normalises each patch by its own
    mean and standard deviation. The losses of several mask sets are averaged. Every token outside the context is
    predicted, whatever the target blocks are.
    """

    predicts = "pixels"
    rules = ("jepa.objectives.rules.mae",)

    def __init__(
        self,
        *,
        encoder: nn.Module,
        num_mask_tokens: int = 1,
        normalize_patches: bool = True,
        decoder_width: PositiveInt | None = None,
        decoder_depth: PositiveInt = 4,
        decoder_num_heads: PositiveInt | None = None,
    ) -> None:
        super().__init__()
        self.encoder: Any = encoder
        self.patch = token_extent(self.encoder)
        self.normalizes = normalize_patches
        self.decoder = PixelDecoder(
            encoder=self.encoder,
            input_dim=self.encoder.embed_dim,
            width=decoder_width,
            depth=decoder_depth,
            num_heads=decoder_num_heads,
            num_mask_tokens=num_mask_tokens,
        )

    @property
    def backbone(self) -> nn.Module:
        return self.encoder

    def forward(self, batch: Batch, masks: Masks) -> LossOutput:
        targets = self.targets(batch.clips)
        losses, embedding = [], None
        for number, mask in enumerate(masks.sets):
            tokens = self.encoder(batch.clips, keep=mask.context)
            embedding = tokens.float().mean(dim=1) if embedding is None else embedding  # [B, D]
            errors = (self.predict(tokens, batch.clips, mask, number) - targets).square().mean(dim=-1)  # [B, N]
            losses.append((errors * hidden(mask, errors)).sum(dim=1).mean() / count_hidden(mask, errors))
        assert embedding is not None
        loss = torch.stack(losses).mean()
        return LossOutput(loss, {"reconstruction": loss.detach()}, embedding.detach())

    def predict(self, tokens: Tensor, clips: Tensor, masks: Masks, mask_set: int) -> Tensor:
        """Context tokens [B, K, D] -> float32 [B, N, P]"""
        return self.decoder(tokens, self.encoder.grid_of(clips), masks.context, mask_set).float()

    def targets(self, clips: Tensor) -> Tensor:
        """[B, C, T, H, W] -> float32 [B, N, P]"""
        pixels = patchify_pixels(clips, self.patch)
        if not self.normalizes:
            return pixels
        variance, mean = torch.var_mean(pixels, dim=-1, keepdim=True)
        return (pixels - mean) / (variance + EPSILON).sqrt()

    @torch.no_grad()
    def diagnose(self, batch: Batch, masks: Masks) -> dict[str, Tensor]:
        """Squared error on the hidden patches of the first mask set, and that of the mean target at each position."""
        targets = self.targets(batch.clips)
        predicted = self.predict(self.encoder(batch.clips, keep=masks.context), batch.clips, masks, 0)
        weights = hidden(masks, predicted[..., 0])
        weights = weights / weights.sum()
        mean = targets.mean(dim=0)
        return {
            "error": ((predicted - targets).square().mean(dim=-1) * weights).sum(),
            "trivial_error": ((targets - mean).square().mean(dim=-1) * weights).sum(),
        }

    @torch.no_grad()
    def pictures(self, batch: Batch, masks: Masks) -> dict[str, Tensor]:
        """The visible patches with the others grey, and the prediction with the hidden patches' true mean and std."""
        clips, grid = batch.clips, self.encoder.grid_of(batch.clips)
        pixels = patchify_pixels(clips, self.patch)
        predicted = self.predict(self.encoder(clips, keep=masks.context), clips, masks, 0)
        if self.normalizes:
            variance, mean = torch.var_mean(pixels, dim=-1, keepdim=True)
            predicted = predicted * (variance + EPSILON).sqrt() + mean
        is_hidden = hidden(masks, predicted[..., 0])[..., None] > 0
        patches = {
            "masked": pixels.masked_fill(is_hidden, 0.0),
            "reconstruction": torch.where(is_hidden, predicted, pixels),
        }
        return {name: unpatchify(p, grid, self.patch)[:, :, : clips.shape[2]] for name, p in patches.items()}


def hidden(masks: Masks, like: Tensor) -> Tensor:
    """-> [B, N]: 1 for tokens outside the context, else 0"""
    return torch.ones_like(like).scatter(1, masks.context, 0.0)


def count_hidden(masks: Masks, like: Tensor) -> int:
    """Number of hidden tokens of each sample."""
    return like.shape[1] - masks.context.shape[1]
