"""Stems: what a token sees of its patch, and the dictionary that is fitted before a network is trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from jepa.encoders.spatial import SpatialEncoder
from jepa.encoders.temporal import TemporalEncoder
from jepa.layers.dictionary import CONTRAST, FLOOR, SIDE, THRESHOLD, principal_embedding, sample
from jepa.layers.stems import fit_stem
from jepa.optim import parameter_groups

SIZES: dict[str, Any] = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
STEMS = ["linear", "conv", "residual", "dictionary"]


def encoder_of(stem: str, frames: int = 1, **changes: Any) -> Any:
    torch.manual_seed(0)
    kind = TemporalEncoder if frames > 1 else SpatialEncoder
    return kind(clip_shape=(3, frames, 16, 24), stem=stem, **(SIZES | changes)).eval()


def random_clips(num: int = 2, frames: int = 1) -> Tensor:
    return torch.randn(num, 3, frames, 16, 24, generator=torch.Generator().manual_seed(1))


def fitted(frames: int = 1, seed: int = 0, **changes: Any) -> Any:
    encoder = encoder_of("dictionary", frames, **changes)
    fit_stem(encoder, random_clips(40, frames).split(16), 40, torch.Generator().manual_seed(seed))
    return encoder


@pytest.mark.parametrize("frames", [1, 4])
@pytest.mark.parametrize("stem", STEMS)
def test_a_token_knows_nothing_of_hidden_patches_and_a_stem_of_all_visible_ones(stem: str, frames: int) -> None:
    encoder, clips = (
        encoder_of(stem, frames, depth=0) if frames == 1 else encoder_of(stem, frames),
        random_clips(2, frames),
    )
    keep = torch.tensor([[0, 4], [5, 1]])
    hidden_changed = clips.clone()
    hidden_changed[0, ..., 8:] += 1  # no part of the tokens 0 and 4 % 3 = 1 of the first row
    hidden_changed[0, ..., 8:16, 8:16] = clips[0, ..., 8:16, 8:16]
    hidden_changed[0, ..., :8, :8] = clips[0, ..., :8, :8]
    torch.testing.assert_close(encoder(hidden_changed, keep=keep), encoder(clips, keep=keep))
    assert encoder(clips, keep=keep).shape == (2, 2, 16)
    assert encoder(clips).shape == (2, encoder.grid.num_tokens, 16)


@pytest.mark.parametrize("stem", STEMS)
def test_the_order_of_kept_tokens_is_that_of_their_indices(stem: str) -> None:
    encoder, clips = encoder_of(stem, depth=0), random_clips()
    everything = torch.tensor([[5, 3, 1, 0, 2, 4]] * 2)
    torch.testing.assert_close(encoder(clips, keep=everything), encoder(clips)[:, everything[0]])


@pytest.mark.parametrize("stem", STEMS)
def test_the_frames_of_a_tubelet_are_seen_together(stem: str) -> None:
    encoder, clips = encoder_of(stem, 4), random_clips(2, 4)
    swapped = clips[:, :, [1, 0, 2, 3]]
    assert not torch.allclose(encoder(clips), encoder(swapped), atol=1e-4)
    still = encoder(clips[:, :, :1])
    torch.testing.assert_close(still, encoder(clips[:, :, :1].expand(-1, -1, 2, -1, -1)))


@pytest.mark.parametrize("stem", ["conv", "residual"])
def test_patches_that_are_no_power_of_two_are_halved_as_often_as_possible(stem: str) -> None:
    torch.manual_seed(0)
    encoder = SpatialEncoder(clip_shape=(1, 1, 24, 24), stem=stem, **(SIZES | {"patch_size": 12}))
    assert encoder.stem.width == 16 * 9  # 12 = 4 * 3: 3 x 3 cells are left
    assert encoder(torch.randn(2, 1, 24, 24)).shape == (2, 4, 16)


def test_every_parameter_of_a_stem_gets_a_gradient_and_muon_its_hidden_layers() -> None:
    encoder = encoder_of("residual")
    encoder.train()(random_clips()).square().sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())
    hidden = {id(p) for group in parameter_groups(encoder) if not group["use_fallback"] for p in group["params"]}
    names = {name for name, parameter in encoder.named_parameters() if id(parameter) in hidden}
    assert {"stem.hidden.0.second.weight", "blocks.0.attn.qkv.weight"} <= names
    assert not names & {"stem.first.conv.weight", "embed.weight", "blocks.0.norm1.weight"}


def test_a_cell_is_the_mean_of_thresholded_responses_of_whitened_windows() -> None:
    stem, pictures = fitted().stem, random_clips(3)[:, :, 0]
    padded = F.pad(pictures, (3, 2, 3, 2), mode="reflect")
    top, left = 4, 10  # of a window of the padded picture: row 2, column 5 of windows
    window = padded[:, :, top : top + SIDE, left : left + SIDE].flatten(1)
    centred = window - window.mean(1, keepdim=True)
    normal = centred / (centred.square().mean(1, keepdim=True) + CONTRAST).sqrt()
    response = normal @ stem.filters.flatten(1).T + stem.offset  # [3, K]
    four = []
    for row in (4, 6):
        for column in (8, 10):
            part = padded[:, :, row : row + SIDE, column : column + SIDE].flatten(1)
            part = part - part.mean(1, keepdim=True)
            part = part / (part.square().mean(1, keepdim=True) + CONTRAST).sqrt()
            four.append(part @ stem.filters.flatten(1).T + stem.offset)
    torch.testing.assert_close(four[1], response)
    positive = torch.stack([(one - THRESHOLD).relu() for one in four]).mean(0)
    negative = torch.stack([(-one - THRESHOLD).relu() for one in four]).mean(0)
    expected = torch.cat([positive, negative], 1).add(FLOOR).sqrt()
    torch.testing.assert_close(stem.describe(pictures)[:, 1, 2], expected, atol=1e-4, rtol=1e-3)


def test_a_fit_is_a_pure_function_of_pictures_and_seed() -> None:
    first, again, other = fitted(), fitted(), fitted(seed=1)
    for name, tensor in first.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, rtol=0, atol=0)
    assert not torch.equal(other.stem.filters, first.stem.filters)
    assert first.stem.is_fitted
    assert not encoder_of("dictionary").stem.is_fitted


@pytest.mark.parametrize("size", [7, 40])
def test_a_fit_does_not_depend_on_how_pictures_are_batched(size: int) -> None:
    encoder = encoder_of("dictionary", 4)
    fit_stem(encoder, random_clips(40, 4).split(size), 40, torch.Generator().manual_seed(0))
    for name, tensor in fitted(4).state_dict().items():
        torch.testing.assert_close(encoder.state_dict()[name], tensor, rtol=0, atol=0)


def test_windows_of_batches_are_those_of_all_pictures_in_a_random_order() -> None:
    pictures = torch.randn(30, 3, 16, 24)
    windows, kept = sample(pictures.split(8), 30, 5, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    shuffled = pictures[torch.randperm(30, generator=generator)]
    assert torch.equal(kept, shuffled[:5])
    draws = torch.rand(3, len(windows), generator=generator)
    for row in (0, 17, 59_999):
        number, top, left = (int(draw * count) for draw, count in zip(draws[:, row], (30, 11, 19), strict=True))
        assert torch.equal(windows[row], shuffled[number, :, top : top + SIDE, left : left + SIDE].flatten())


@pytest.mark.parametrize("frames", [1, 4])
def test_cells_are_standardised_and_tokens_embedded_by_principal_components(frames: int) -> None:
    encoder, clips = fitted(frames), random_clips(40, frames)
    pictures = (
        clips[:, :, 0]
        if frames == 1
        else clips.unflatten(2, (2, 2)).permute(0, 2, 1, 3, 4, 5).flatten(0, 1).flatten(1, 2)
    )
    cells = encoder.stem(pictures).unflatten(2, (4, -1)).flatten(0, 2)
    torch.testing.assert_close(cells.mean(0), torch.zeros(cells.shape[1]), atol=1e-3, rtol=0)
    torch.testing.assert_close(cells.std(0), torch.ones(cells.shape[1]), atol=2e-2, rtol=0)
    tokens = encoder.embed(encoder.stem(pictures)).flatten(0, 1)
    covariance = tokens.T @ tokens / len(tokens)
    off_diagonal = covariance - covariance.diag().diag()
    assert off_diagonal.abs().max() < 1e-2 * covariance.diag().max()
    torch.testing.assert_close(tokens.mean(0), torch.zeros(16), atol=1e-2, rtol=0)


def test_an_embedding_that_is_wider_than_its_input_has_rows_of_zeros() -> None:
    weight, bias = principal_embedding(torch.randn(50, 3), 5, torch.Generator())
    assert weight.shape == (5, 3)
    assert (weight[:3].abs().sum(1) > 0).all()
    assert not weight[3:].any()
    assert not bias[3:].any()


def test_principal_components_of_wide_tokens_are_found_in_a_subspace(monkeypatch) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(4000, 400, generator=generator) @ torch.randn(400, 400, generator=generator)
    tokens *= torch.linspace(1, 0.2, 400)
    exact, _ = principal_embedding(tokens.clone(), 20, generator)
    monkeypatch.setattr("jepa.layers.dictionary.EXACT_WIDTH", 300)
    near, bias = principal_embedding(tokens + 5, 20, torch.Generator().manual_seed(1))
    again, _ = principal_embedding(tokens + 5, 20, torch.Generator().manual_seed(1))
    assert torch.equal(near, again)

    def explained(weight: Tensor) -> float:
        """Variance of the tokens along the directions of the rows."""
        return float((tokens @ torch.linalg.qr(weight.T).Q).square().sum() / tokens.square().sum())

    assert explained(near) > 0.97 * explained(exact)
    torch.testing.assert_close((tokens + 5) @ near.T + bias, (tokens - tokens.mean(0)) @ near.T, atol=2e-3, rtol=1e-3)


def test_filters_learn_after_the_share_of_the_run_for_which_they_are_frozen() -> None:
    encoder = fitted(stem_frozen=0.5)
    optimizer = torch.optim.AdamW(parameter_groups(encoder), lr=0.1, weight_decay=0.1)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.1 if group["decays"] else 0.0
    before = encoder.stem.filters.detach().clone()
    for progress in (0.0, 0.25, 0.49):
        encoder.stem.at(progress)
        encoder(random_clips()).square().sum().backward()
        assert not encoder.stem.filters.grad.any()
        optimizer.step()
    assert torch.equal(encoder.stem.filters, before)
    encoder.stem.at(0.5)
    encoder(random_clips()).sin().sum().backward()
    optimizer.step()
    assert not torch.equal(encoder.stem.filters, before)


def test_a_dictionary_that_is_never_trained_is_no_parameter_of_the_optimizer() -> None:
    encoder = fitted()
    ids = {id(parameter) for group in parameter_groups(encoder) for parameter in group["params"]}
    assert id(encoder.stem.filters) not in ids
    encoder.stem.at(1.0)
    assert encoder.stem.is_frozen


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"stem": "linear", "stem_width": 32}, r"encoder.stem_width=32: stem=linear has none"),
        ({"stem": "linear", "stem_frozen": 0.5}, r"encoder.stem_frozen=0.5: stem=linear is always trained"),
        ({"stem": "dictionary", "patch_size": 6}, r"encoder.patch_size=\[6, 6\]: stem=dictionary needs multiples of 4"),
        ({"stem": "conv", "patch_size": 3}, r"encoder.patch_size=\[3, 3\].*halves patches of even sides"),
        ({"stem": "residual", "stem_width": 30}, r"stem_width=30: .*a multiple of 4"),
    ],
)
def test_a_stem_that_cannot_be_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        SpatialEncoder(clip_shape=(3, 1, 24, 24), **(SIZES | changes))


def test_chunks_change_no_number() -> None:
    stem, pictures = fitted().stem, random_clips(40)[:, :, 0].repeat(8, 1, 1, 1)
    assert len(pictures) * 128 * 16 * 24 // 4 > 2**19  # more than one chunk
    together = (stem.describe(pictures) - stem.mean) * stem.scale
    torch.testing.assert_close(
        stem(pictures).unflatten(2, (2, 2, -1)).flatten(0, 3).sum(0),
        together.flatten(0, 2).sum(0),
        rtol=1e-3,
        atol=1e-2,
    )
