"""Masked autoencoder (He et al. 2022): predict the pixels of the hidden patches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from jepa.layers.decoder import PixelDecoder
from jepa.layers.tokens import patchify_pixels, token_extent, unpatchify
from jepa.objectives.base import Objective
from jepa.types import Batch, LossOutput, Masks, PositiveInt

EPSILON = 1e-6
"""Added to the variance of a patch."""


class MAE(Objective):
    """The encoder sees the context tokens; a small decoder predicts all other patches, whatever the target blocks are.

    The loss is the squared error of the hidden patches' pixels; `normalize_patches` normalises each patch by its own
    mean and standard deviation. The losses of several mask sets are averaged.
    """

    predicts = "pixels"
    rules = ("jepa.objectives.rules.mae",)

    def __init__(
        self, *, encoder: nn.Module, num_mask_tokens: int = 1, normalize_patches: bool = True,
        decoder_width: PositiveInt | None = None, decoder_depth: PositiveInt = 4,
        decoder_num_heads: PositiveInt | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.encoder: Any = encoder
        self.patch = token_extent(self.encoder)
        self.normalizes = normalize_patches
        self.decoder = PixelDecoder(
            encoder=self.encoder, input_dim=self.encoder.embed_dim, width=decoder_width, depth=decoder_depth,
            num_heads=decoder_num_heads, num_mask_tokens=num_mask_tokens,
        )  # fmt: skip

    def forward(self, batch: Batch, masks: Masks) -> LossOutput:
        targets = self.targets(batch.clips)
        losses, embedding = [], None
        for number, mask in enumerate(masks.sets):
            tokens = self.encoder(batch.clips, keep=mask.context)
            embedding = tokens.float().mean(dim=1) if embedding is None else embedding  # [B, D]
            errors = (self.predict(tokens, batch.clips, mask, number) - targets).square().mean(dim=-1)  # [B, N]
            num_hidden = errors.shape[1] - mask.context.shape[1]
            losses.append((errors * hidden(mask, errors)).sum(dim=1).mean() / num_hidden)
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
        mean, std = patch_statistics(pixels)
        return (pixels - mean) / std

    @torch.no_grad()
    def diagnose(self, batch: Batch, masks: Masks) -> dict[str, Tensor]:
        """Squared error on the hidden patches of the first mask set, and of the batch's mean target as prediction."""
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
        """The visible patches, the hidden ones grey; and the predictions scaled by the hidden patches' mean and std."""
        clips, grid = batch.clips, self.encoder.grid_of(batch.clips)
        pixels = patchify_pixels(clips, self.patch)
        predicted = self.predict(self.encoder(clips, keep=masks.context), clips, masks, 0)
        if self.normalizes:
            mean, std = patch_statistics(pixels)
            predicted = predicted * std + mean
        is_hidden = hidden(masks, predicted[..., 0])[..., None] > 0
        patches = {
            "masked": pixels.masked_fill(is_hidden, 0.0),
            "reconstruction": torch.where(is_hidden, predicted, pixels),
        }
        return {name: unpatchify(p, grid, self.patch)[:, :, : clips.shape[2]] for name, p in patches.items()}


def hidden(masks: Masks, like: Tensor) -> Tensor:
    """-> [B, N], shape and dtype of `like`: 1 for tokens outside the context, else 0"""
    return torch.ones_like(like).scatter(1, masks.context, 0.0)


def patch_statistics(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """[B, N, P] -> mean and standard deviation of each patch, [B, N, 1]"""
    variance, mean = torch.var_mean(pixels, dim=-1, keepdim=True)
    return mean, (variance + EPSILON).sqrt()
