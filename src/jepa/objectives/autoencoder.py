"""Autoencoder (Hinton and Salakhutdinov 2006): reconstruct the pixels from a few numbers."""

from __future__ import annotations

from typing import Literal

from torch import nn

from jepa.layers.tokens import patchify_pixels
from jepa.objectives.reconstruction import Reconstruction
from jepa.types import Batch, LossOutput, Masks, PositiveInt


class Autoencoder(Reconstruction):
    """Squared error of normalised pixels, mean over all of them."""

    def __init__(
        self, *, encoder: nn.Module, latent_dim: PositiveInt = 128, bottleneck: Literal["pooled", "tokens"] = "pooled",
        decoder_width: PositiveInt | None = None, decoder_depth: PositiveInt = 4,
        decoder_num_heads: PositiveInt | None = None,
    ) -> None:  # fmt: skip
        sizes = {"width": decoder_width, "depth": decoder_depth, "num_heads": decoder_num_heads}
        super().__init__(encoder=encoder, latent_dim=latent_dim, bottleneck=bottleneck, **sizes)

    def forward(self, batch: Batch, masks: Masks) -> LossOutput:
        tokens, code = self.encode(batch.clips)
        reconstructions = self.decode(code, self.encoder.grid_of(batch.clips))
        loss = (reconstructions - patchify_pixels(batch.clips, self.patch)).square().mean()
        return LossOutput(loss, {"reconstruction": loss.detach()}, tokens.float().mean(dim=1).detach())
