"""What objectives share that reconstruct the pixels from a bottleneck."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from jepa.layers.decoder import PixelDecoder
from jepa.layers.tokens import patchify_pixels, token_extent, unpatchify
from jepa.objectives.base import Objective
from jepa.types import Batch, Masks, PatchGrid


class Reconstruction(Objective):
    """Encoder, bottleneck and decoder; masks are not used.

    With `bottleneck=pooled` the mean token of a clip is compressed to `latent_dim` latents, with `tokens` each token.
    """

    predicts = "pixels"
    numbers_per_latent = 1
    """Number of encoder outputs for each latent."""

    def __init__(
        self, *, encoder: nn.Module, latent_dim: int, bottleneck: str, width: int | None, depth: int,
        num_heads: int | None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.encoder: Any = encoder
        self.patch = token_extent(self.encoder)
        self.is_pooled = bottleneck == "pooled"
        self.squeeze = nn.Linear(self.encoder.embed_dim, latent_dim * self.numbers_per_latent)
        self.decoder = PixelDecoder(
            encoder=self.encoder, input_dim=latent_dim, width=width, depth=depth, num_heads=num_heads
        )

    def encode(self, clips: Tensor) -> tuple[Tensor, Tensor]:
        """[B, C, T, H, W] -> tokens [B, N, D], bottleneck [B, 1 or N, latent_dim * numbers_per_latent]"""
        tokens = self.encoder(clips)
        return tokens, self.squeeze(tokens.mean(dim=1, keepdim=True) if self.is_pooled else tokens)

    def latents(self, code: Tensor) -> Tensor:
        """[B, S, numbers] -> [B, S, latent_dim]: the most likely latents"""
        return code

    def decode(self, latents: Tensor, grid: PatchGrid) -> Tensor:
        """[B, S, latent_dim] -> float32 pixels [B, N, P]"""
        return self.decoder(latents, grid).float()

    @torch.no_grad()
    def diagnose(self, batch: Batch, masks: Masks) -> dict[str, Tensor]:
        """Squared error of the reconstruction, and of the mean clip of the batch."""
        pixels, grid = patchify_pixels(batch.clips, self.patch), self.encoder.grid_of(batch.clips)
        reconstructions = self.decode(self.latents(self.encode(batch.clips)[1]), grid)
        return {
            "error": (reconstructions - pixels).square().mean(),
            "trivial_error": (pixels - pixels.mean(dim=0)).square().mean(),
        }

    @torch.no_grad()
    def pictures(self, batch: Batch, masks: Masks) -> dict[str, Tensor]:
        latents = self.latents(self.encode(batch.clips)[1])
        return {"reconstruction": self.to_clips(latents, batch.clips)}

    def to_clips(self, latents: Tensor, clips: Tensor) -> Tensor:
        """[b, S, latent_dim] -> [b, C, T, H, W], the shape of `clips`"""
        grid = self.encoder.grid_of(clips)
        return unpatchify(self.decode(latents, grid), grid, self.patch)[:, :, : clips.shape[2]]
