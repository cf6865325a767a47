"""Autoencoder (Hinton and Salakhutdinov 2006): rebuild the pixels from a few numbers."""

from __future__ import annotations

from typing import Literal

from torch import nn

from jepa.layers.tokens import patchify_pixels
from jepa.objectives.reconstruction import Reconstruction
from jepa.types import Batch, LossOutput, Masks, PositiveInt


class Autoencoder(Reconstruction):
    """Squared error of normalised pixels, mean over all of them; masks are not used."""

    def __init__(
        self,
        *,
        encoder: nn.Module,
        latent_dim: PositiveInt = 128,
        bottleneck: Literal["pooled", "tokens"] = "pooled",
        decoder_width: PositiveInt | None = None,
        decoder_depth: PositiveInt = 4,
        decoder_num_heads: PositiveInt | None = None,
    ) -> None:
        super().__init__(
            encoder=encoder,
            latent_dim=latent_dim,
            bottleneck=bottleneck,
            numbers_per_latent=1,
            decoder_width=decoder_width,
            decoder_depth=decoder_depth,
            decoder_num_heads=decoder_num_heads,
        )

    def forward(self, batch: Batch, masks: Masks) -> LossOutput:
        tokens, code = self.encode(batch.clips)
        rebuilt = self.decode(code, self.encoder.grid_of(batch.clips))
        loss = (rebuilt - patchify_pixels(batch.clips, self.patch)).square().mean()
        return LossOutput(loss, {"reconstruction": loss.detach()}, tokens.float().mean(dim=1).detach())
