"""Autoencoder, VAE and MAE: their losses against independent formulas, their pictures, and their errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from checked import checked
from torch import Tensor
from torch.distributions import Independent, Normal, kl_divergence

from jepa.encoders.spatial import SpatialEncoder
from jepa.encoders.temporal import TemporalEncoder
from jepa.layers.tokens import patchify, patchify_pixels, token_extent, unpatchify
from jepa.objectives.autoencoder import Autoencoder
from jepa.objectives.mae import MAE
from jepa.objectives.vae import VAE, posterior
from jepa.types import Batch, Masks, MaskSets

B, K, D = 4, 5, 16
IMAGE, CLIP = (3, 1, 16, 24), (2, 4, 8, 12)


def image_encoder() -> SpatialEncoder:
    return SpatialEncoder(clip_shape=IMAGE, patch_size=(4, 8), embed_dim=D, depth=1, num_heads=2)


def clip_encoder() -> TemporalEncoder:
    return TemporalEncoder(clip_shape=CLIP, patch_size=4, tubelet_size=2, embed_dim=D, depth=1, num_heads=2)


def make(kind: Any, encoder: Any = None, **changes: Any) -> Any:
    torch.manual_seed(0)
    return checked(kind, encoder=encoder or image_encoder(), decoder_depth=1, decoder_num_heads=2, **changes)


def sample(shape: tuple[int, ...] = IMAGE, batch_size: int = B) -> Batch:
    generator = torch.Generator().manual_seed(1)
    clips = torch.randn(batch_size, *shape, generator=generator) + 0.3
    return Batch(clips, {"labels": torch.zeros(batch_size, dtype=torch.long)})


def some_masks(num_tokens: int, num_context: int = K, seed: int = 2) -> Masks:
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(num_tokens, generator=generator) for _ in range(B)])
    return Masks(order[:, :num_context].sort().values, order[:, num_context : num_context + 2, None].sort(1).values)


NONE = Masks(torch.zeros(B, 0, dtype=torch.long), torch.zeros(B, 0, 0, dtype=torch.long))


def patches_by_hand(clip: np.ndarray, size: tuple[int, int, int]) -> np.ndarray:
    """[C, T, H, W] -> [N, C*t*h*w] by loops"""
    t, h, w = size
    _, frames, height, width = clip.shape
    return np.stack([
        clip[:, i : i + t, j : j + h, k : k + w].ravel()
        for i in range(0, frames, t) for j in range(0, height, h) for k in range(0, width, w)
    ])  # fmt: skip


def test_a_patch_has_the_extent_of_one_token_of_the_encoder() -> None:
    assert token_extent(image_encoder()) == (1, 4, 8)
    assert token_extent(clip_encoder()) == (2, 4, 4)


def test_unpatchify_undoes_patchify() -> None:
    clips = sample(CLIP).clips
    grid = clip_encoder().grid
    assert torch.equal(unpatchify(patchify(clips, (2, 4, 4)), grid, (2, 4, 4)), clips)


def test_an_image_fills_a_tubelet_by_being_repeated() -> None:
    image = sample((2, 1, 8, 12)).clips
    assert torch.equal(patchify_pixels(image, (2, 4, 4)), patchify_pixels(image.expand(-1, -1, 2, -1, -1), (2, 4, 4)))


@pytest.mark.parametrize("normalize", [True, False])
def test_mae_loss_is_the_error_of_the_hidden_patches(normalize: bool) -> None:
    objective, batch, masks = make(MAE, normalize_patches=normalize), sample(), some_masks(12)
    output = objective(batch, masks)
    predicted = objective.predict(objective.encoder(batch.clips, keep=masks.context), batch.clips, masks, 0)
    total, count = 0.0, 0
    for row, clip in enumerate(batch.clips.float().numpy()):
        patches = patches_by_hand(clip, (1, 4, 8))
        for token in set(range(12)) - set(masks.context[row].tolist()):
            patch = patches[token]
            if normalize:
                patch = (patch - patch.mean()) / np.sqrt(patch.var(ddof=1) + 1e-6)
            total += ((predicted[row, token].detach().numpy() - patch) ** 2).mean()
            count += 1
    assert output.loss.item() == pytest.approx(total / count, rel=1e-5)


def test_mae_predictions_do_not_depend_on_the_hidden_patches() -> None:
    objective, batch, masks = make(MAE), sample(), some_masks(12)
    before = objective.predict(objective.encoder(batch.clips, keep=masks.context), batch.clips, masks, 0)
    unseen = torch.ones(B, 12, dtype=torch.bool).scatter(1, masks.context, False)
    patches = patchify(batch.clips, (1, 4, 8)).masked_fill(unseen[..., None], 9.0)
    changed = unpatchify(patches, objective.encoder.grid, (1, 4, 8))
    after = objective.predict(objective.encoder(changed, keep=masks.context), changed, masks, 0)
    assert torch.equal(before, after)


def test_mae_averages_over_mask_sets_and_gives_each_its_mask_token() -> None:
    objective, batch = make(MAE, num_mask_tokens=2), sample()
    sets = [some_masks(12), some_masks(12, num_context=3, seed=5)]
    first = objective(batch, sets[0]).loss
    both = objective(batch, MaskSets(sets)).loss
    with torch.no_grad():
        objective.decoder.mask_tokens.copy_(objective.decoder.mask_tokens.flip(0))
    second = objective(batch, sets[1]).loss
    assert both.item() == pytest.approx((first + second).item() / 2)


def test_the_decoder_puts_context_tokens_in_their_places() -> None:
    objective, masks = make(MAE), some_masks(12)
    tokens = torch.randn(B, K, D)
    shuffled = torch.stack([torch.randperm(K) for _ in range(B)])
    again = tokens.gather(1, shuffled[..., None].expand(-1, -1, D))
    pixels = objective.decoder(tokens, objective.encoder.grid, masks.context)
    other = objective.decoder(again, objective.encoder.grid, masks.context.gather(1, shuffled))
    assert torch.allclose(pixels, other, atol=1e-6)


@pytest.mark.parametrize("bottleneck", ["pooled", "tokens"])
def test_autoencoder_loss_is_the_mean_squared_error_of_the_pixels(bottleneck: str) -> None:
    objective, batch = make(Autoencoder, latent_dim=3, bottleneck=bottleneck), sample()
    reconstruction = objective.pictures(batch, NONE)["reconstruction"]
    expected = np.mean((reconstruction.numpy() - batch.clips.numpy()) ** 2)
    assert objective(batch, NONE).loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", [Autoencoder, VAE])
def test_the_embedding_is_the_mean_of_the_tokens_of_each_clip_without_gradients(kind: Any) -> None:
    objective, batch = make(kind, latent_dim=3), sample()
    embedding = objective(batch, NONE).embedding
    assert not embedding.requires_grad
    torch.testing.assert_close(embedding, objective.encoder(batch.clips).mean(dim=1))


def test_a_pooled_bottleneck_has_one_latent_per_clip() -> None:
    objective = make(Autoencoder, latent_dim=3)
    assert objective.encode(sample().clips)[1].shape == (B, 1, 3)
    assert make(Autoencoder, latent_dim=3, bottleneck="tokens").encode(sample().clips)[1].shape == (B, 12, 3)


@pytest.mark.slow
def test_an_autoencoder_overfits_a_few_images() -> None:
    objective, batch = make(Autoencoder, latent_dim=4), sample()
    batch = batch._replace(clips=batch.clips.mean(dim=(2, 4), keepdim=True).mul(5).expand_as(batch.clips))  # stripes
    optimizer = torch.optim.Adam(objective.parameters(), lr=3e-3)
    for _ in range(500):
        optimizer.zero_grad()
        objective(batch, NONE).loss.backward()
        optimizer.step()
    diagnosis = objective.diagnose(batch, NONE)
    assert diagnosis["error"] < 0.5 * diagnosis["trivial_error"]


@pytest.mark.parametrize("bottleneck", ["pooled", "tokens"])
@pytest.mark.parametrize("beta", [1.0, 4.0])
def test_vae_loss_is_the_scaled_evidence_lower_bound(bottleneck: str, beta: float) -> None:
    objective, batch = make(VAE, latent_dim=3, bottleneck=bottleneck, beta=beta), sample()
    torch.manual_seed(7)
    loss = objective(batch, NONE).loss.item()
    torch.manual_seed(7)
    mean, log_variance = posterior(objective.encode(batch.clips)[1])
    posterior_normal = Independent(Normal(mean, (log_variance / 2).exp()), 2)
    latents = mean + posterior_normal.base_dist.scale * torch.randn_like(mean)
    likelihood = Independent(Normal(objective.to_clips(latents, batch.clips), 1.0), 4)
    prior = Independent(Normal(torch.zeros_like(mean), torch.ones_like(mean)), 2)
    num_pixels = batch.clips[0].numel()
    constant = num_pixels / 2 * np.log(2 * np.pi)
    bound = likelihood.log_prob(batch.clips).mean() - beta * kl_divergence(posterior_normal, prior).mean() + constant
    assert loss == pytest.approx(-2 / num_pixels * bound.item(), rel=1e-5)


def test_free_bits_charge_only_what_is_above_them() -> None:
    batch = sample()
    losses, kls = {}, {}
    for free in (0.0, 100.0):
        torch.manual_seed(7)
        objective = make(VAE, latent_dim=3, free_bits=free)
        torch.manual_seed(7)
        output = objective(batch, NONE)
        losses[free], kls[free] = output.loss.item(), output.metrics["kl"].item()
    num_pixels = batch.clips[0].numel()
    assert kls[0.0] == kls[100.0] < 100
    assert losses[100.0] - losses[0.0] == pytest.approx(2 * (3 * 100 - kls[0.0]) / num_pixels, rel=1e-4)


def test_vae_draws_the_same_samples_at_every_evaluation_and_walks_between_two_images() -> None:
    objective, batch = make(VAE, latent_dim=3), sample()
    first, second = objective.pictures(batch, NONE), objective.pictures(batch, NONE)
    assert torch.equal(first["samples"], second["samples"])
    ends = first["interpolations"].unflatten(0, (2, 8))[:, [0, -1]].flatten(0, 1)
    assert torch.allclose(ends, first["reconstruction"], atol=1e-6)


@pytest.mark.parametrize("kind", [Autoencoder, VAE, MAE])
@pytest.mark.parametrize(("encoder", "shape"), [(image_encoder, IMAGE), (clip_encoder, CLIP)])
def test_pictures_have_the_shape_of_the_clips_and_all_weights_learn(kind: Any, encoder: Any, shape: Any) -> None:
    objective, batch = make(kind, encoder()), sample(shape)
    masks = some_masks(objective.encoder.grid.num_tokens)
    objective(batch, masks).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in objective.parameters())
    pictures = objective.pictures(batch, masks)
    assert "reconstruction" in pictures
    assert {tuple(clips.shape[1:]) for clips in pictures.values()} == {shape}


def test_an_encoder_of_clips_rebuilds_images_too() -> None:
    batch = sample((2, 1, 8, 12))
    for kind in (Autoencoder, MAE):
        objective = make(kind, clip_encoder())
        assert objective.pictures(batch, some_masks(6, 3))["reconstruction"].shape == batch.clips.shape
        assert objective(batch, some_masks(6, 3)).loss.isfinite()


def test_mae_pictures_show_visible_patches_unchanged_and_hide_the_others() -> None:
    objective, batch, masks = make(MAE), sample(), some_masks(12)
    pictures = objective.pictures(batch, masks)
    masked, rebuilt = (patchify_pixels(pictures[name], (1, 4, 8)) for name in ("masked", "reconstruction"))
    original = patchify_pixels(batch.clips, (1, 4, 8))
    index = masks.context[..., None].expand(-1, -1, original.shape[-1])
    assert torch.equal(masked.gather(1, index), original.gather(1, index))
    assert torch.equal(rebuilt.gather(1, index), original.gather(1, index))
    assert (masked.abs().sum(-1) > 0).sum(dim=1).tolist() == [K] * B


def trivial(targets: Tensor, weights: Tensor) -> float:
    return float((((targets - targets.mean(0)) ** 2).mean(-1) * weights).sum() / weights.sum())


def test_the_trivial_error_is_that_of_the_mean_target() -> None:
    batch, masks = sample(), some_masks(12)
    auto, mae = make(Autoencoder), make(MAE, normalize_patches=False)
    pixels = patchify_pixels(batch.clips, (1, 4, 8))
    everywhere = torch.ones(B, 12)
    assert float(auto.diagnose(batch, masks)["trivial_error"]) == pytest.approx(trivial(pixels, everywhere), rel=1e-5)
    unseen = everywhere.scatter(1, masks.context, 0.0)
    assert float(mae.diagnose(batch, masks)["trivial_error"]) == pytest.approx(trivial(pixels, unseen), rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "changes", "key"),
    [
        (Autoencoder, {"latent_dim": 0}, "latent_dim=0"),
        (Autoencoder, {"bottleneck": "pool"}, "bottleneck=pool"),
        (VAE, {"beta": -1.0}, "beta=-1.0"),
        (VAE, {"free_bits": -1.0}, "free_bits=-1.0"),
        (MAE, {"decoder_width": 9}, "objective.decoder_width=9"),
    ],
)
def test_invalid_values_are_refused_by_their_key(kind: Any, changes: dict, key: str) -> None:
    with pytest.raises(ValueError, match=key):
        make(kind, **changes)
