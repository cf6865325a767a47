"""What objectives report and show: rates over the labelled samples, pictures of any number of clips, and no graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jepa.encoders.spatial import SpatialEncoder
from jepa.layers.tokens import patchify_pixels
from jepa.objectives.autoencoder import Autoencoder
from jepa.objectives.classify import Classification
from jepa.objectives.jepa import JEPA
from jepa.objectives.mae import MAE
from jepa.objectives.vae import NUM_SAMPLES, NUM_STEPS, VAE
from jepa.predictors.transformer import TransformerPredictor
from jepa.types import Batch, Masks

IMAGE, K = (3, 1, 16, 16), 6
SMALL: dict[str, Any] = {"decoder_depth": 1, "decoder_num_heads": 2}


def encoder() -> SpatialEncoder:
    torch.manual_seed(0)
    return SpatialEncoder(clip_shape=IMAGE, patch_size=4, embed_dim=16, depth=1, num_heads=2)


def jepa(**changes: Any) -> JEPA:
    built = encoder()
    predictor = TransformerPredictor(grid=built.grid, embed_dim=16, num_heads=2, width=16, depth=1)
    return JEPA(encoder=built, predictor=predictor, batch_size=4, total_steps=10, **changes)


def batch_of(size: int, labels: list[int] | None = None) -> Batch:
    clips = torch.randn(size, *IMAGE, generator=torch.Generator().manual_seed(1)) + 0.3
    return Batch(clips, {"labels": torch.tensor(labels or [0] * size)})


def masks_of(size: int) -> Masks:
    order = torch.rand(size, 16, generator=torch.Generator().manual_seed(2)).argsort(dim=1)
    return Masks(order[:, :K].sort(dim=1).values, order[:, None, K:].sort(dim=2).values)


OBJECTIVES = {
    "jepa": jepa,
    "mae": lambda: MAE(encoder=encoder(), **SMALL),
    "autoencoder": lambda: Autoencoder(encoder=encoder(), latent_dim=4, **SMALL),
    "vae": lambda: VAE(encoder=encoder(), latent_dim=4, **SMALL),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_is_reported_and_shown_keeps_no_graph(name: str) -> None:
    objective, batch, masks = OBJECTIVES[name](), batch_of(4), masks_of(4)
    output = objective(batch, masks)
    assert output.loss.requires_grad
    tensors = [output.embedding, *output.metrics.values(), *objective.diagnose(batch, masks).values()]
    assert not [tensor for tensor in (*tensors, *objective.pictures(batch, masks).values()) if tensor.requires_grad]


def test_without_regularisers_nothing_asks_for_the_whole_batch() -> None:
    assert jepa().regularization is None
    assert Classification(encoder=encoder(), classes=("ant", "bee")).regularization is None


@pytest.mark.parametrize(
    "labels", [[0, 1, 2, 0], [0, 0, 0, 0], [0, -1, 1, 2], [-1, -1, 2, 0], [-1, -1, -1, -1], [2, 2, -1, 1]], ids=str
)
def test_accuracy_is_the_share_of_the_labelled_samples_that_are_right(labels: list[int]) -> None:
    objective = Classification(encoder=encoder(), classes=("ant", "bee", "cat"))
    nn.init.normal_(objective.classifier.classify.weight)
    batch = batch_of(4, labels)
    chosen = objective.classifier(batch.clips).argmax(dim=1).tolist()
    for truth in (labels, [label if label < 0 else best for label, best in zip(labels, chosen, strict=True)]):
        pairs = [pair for pair in zip(truth, chosen, strict=True) if pair[0] >= 0]
        expected = sum(label == best for label, best in pairs) / max(len(pairs), 1)
        output = objective(Batch(batch.clips, {"labels": torch.tensor(truth)}), masks_of(4))
        assert output.metrics["accuracy"].item() == pytest.approx(expected)
        assert output.loss.isfinite()


@pytest.mark.parametrize("normalizes", [True, False])
def test_a_hidden_patch_is_drawn_with_its_own_mean_and_deviation(monkeypatch, normalizes: bool) -> None:
    """A prediction of zeros gives the mean of each patch, one of the targets the patch itself; what is seen stays."""
    objective, batch, masks = MAE(encoder=encoder(), normalize_patches=normalizes, **SMALL), batch_of(4), masks_of(4)
    pixels, targets = patchify_pixels(batch.clips, objective.patch), objective.targets(batch.clips)

    def drawn(prediction: Tensor) -> Tensor:
        monkeypatch.setattr(objective, "predict", lambda *_: prediction)
        return patchify_pixels(objective.pictures(batch, masks)["reconstruction"], objective.patch)

    torch.testing.assert_close(drawn(targets), pixels, atol=1e-5, rtol=1e-4)
    hidden = torch.ones(4, 16, dtype=torch.bool).scatter(1, masks.context, False)
    means = pixels.mean(dim=-1, keepdim=True) * normalizes
    torch.testing.assert_close(drawn(torch.zeros_like(pixels)), torch.where(hidden[..., None], means, pixels))


@pytest.mark.parametrize("number", [1, 2, 3, 5])
def test_pairs_of_clips_are_joined_by_interpolations_that_begin_and_end_at_them(number: int) -> None:
    objective, batch = VAE(encoder=encoder(), latent_dim=4, **SMALL), batch_of(number)
    pictures = objective.pictures(batch, masks_of(number))
    assert pictures["samples"].shape == (NUM_SAMPLES, *IMAGE)
    assert ("interpolations" in pictures) == (number > 1)
    if number > 1:
        rows = pictures["interpolations"].unflatten(0, (number // 2, NUM_STEPS))
        pairs = pictures["reconstruction"][: number // 2 * 2].unflatten(0, (-1, 2))
        torch.testing.assert_close(rows[:, 0], pairs[:, 0])
        torch.testing.assert_close(rows[:, -1], pairs[:, 1])
