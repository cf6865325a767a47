"""Variational autoencoder (Kingma and Welling 2014), weighted as beta-VAE (Higgins et al. 2017)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from jepa.layers.tokens import patchify_pixels
from jepa.objectives.reconstruction import Reconstruction
from jepa.types import Batch, LossOutput, Masks, NonNegative, PositiveInt

NUM_SAMPLES, NUM_STEPS = 16, 8
"""Number of sampled pictures, and of pictures from one image to the next."""
SEED = 0
"""Seed of the latents of the sampled pictures, the same at every evaluation."""


class VAE(Reconstruction):
    """Squared error of normalised pixels plus the divergence of the latents' posterior from a standard normal.

    The loss is 2/P times the negative evidence lower bound of P pixels with unit variance, without its constant:
    mean squared error + 2 beta KL / P. `free_bits` is the KL of each latent in nats, averaged over the batch, that is
    free (Kingma et al. 2016, equation 15).
    """

    numbers_per_latent = 2

    def __init__(
        self, *, encoder: nn.Module, latent_dim: PositiveInt = 128, bottleneck: Literal["pooled", "tokens"] = "pooled",
        beta: NonNegative = 1.0, free_bits: NonNegative = 0.0, decoder_width: PositiveInt | None = None,
        decoder_depth: PositiveInt = 4, decoder_num_heads: PositiveInt | None = None,
    ) -> None:  # fmt: skip
        sizes = {"width": decoder_width, "depth": decoder_depth, "num_heads": decoder_num_heads}
        super().__init__(encoder=encoder, latent_dim=latent_dim, bottleneck=bottleneck, **sizes)
        self.beta = beta
        self.free_bits = free_bits

    def forward(self, batch: Batch, masks: Masks) -> LossOutput:
        tokens, stats = self.encode(batch.clips)
        mean, log_variance = posterior(stats)
        latents = mean + (log_variance / 2).exp() * torch.randn_like(mean)
        pixels = patchify_pixels(batch.clips, self.patch)
        error = (self.decode(latents, self.encoder.grid_of(batch.clips)) - pixels).square().mean()
        divergence = divergence_from_normal(mean, log_variance).mean(dim=0)  # [S, latent_dim]
        penalty = divergence.clamp_min(self.free_bits).sum()
        loss = error + 2 * self.beta * penalty / pixels[0].numel()
        metrics = {"reconstruction": error.detach(), "kl": divergence.sum().detach()}
        return LossOutput(loss, metrics, tokens.float().mean(dim=1).detach())

    def latents(self, code: Tensor) -> Tensor:
        return posterior(code)[0]

    @torch.no_grad()
    def pictures(self, batch: Batch, masks: Masks) -> dict[str, Tensor]:
        clips = batch.clips
        latents = self.latents(self.encode(clips)[1])
        noise = torch.randn(NUM_SAMPLES, *latents.shape[1:], generator=torch.Generator().manual_seed(SEED))
        pictures = {"reconstruction": latents, "samples": noise.to(latents)}
        if len(clips) > 1:
            starts, ends = latents[: len(latents) // 2 * 2].unflatten(0, (-1, 2)).unbind(1)
            weights = torch.linspace(0, 1, NUM_STEPS, device=latents.device)[:, None, None]
            pictures["interpolations"] = torch.lerp(starts[:, None], ends[:, None], weights).flatten(0, 1)
        return {name: self.to_clips(values, clips) for name, values in pictures.items()}


def posterior(stats: Tensor) -> tuple[Tensor, Tensor]:
    """[..., 2 latent_dim] -> float32 mean and logarithm of the variance of each latent, clamped to [-20, 20]."""
    mean, log_variance = stats.float().chunk(2, dim=-1)
    return mean, log_variance.clamp(-20, 20)


def divergence_from_normal(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, variance) || N(0, 1)) of each latent in nats (Kingma and Welling 2014, appendix B)."""
    return (mean.square() + log_variance.exp() - 1 - log_variance) / 2
