"""Colour augmentation: agreement with torchvision, one draw for all frames, and none if switched off."""

from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor
from torchvision.transforms.v2 import functional as reference

from jepa.data.colour import NUM_DRAWS, Colour, blur, jitter, luma, rotate_hue
from jepa.data.transforms import Augment
from jepa.types import RawBatch

SHARES = {"jitter": 1.0, "grayscale": 0.2, "blur": 0.5, "solarize": 0.2}


def seeded(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def pixels(rows: int = 6, channels: int = 3, frames: int = 1, side: int = 20, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (rows, channels, frames, side, side), generator=seeded(seed)).float()


def raw(clips: Tensor) -> RawBatch:
    labels = torch.full((len(clips),), -1)
    sizes = torch.tensor(clips.shape[-2:]).expand(len(clips), 2)
    return RawBatch(clips.to(torch.uint8), sizes, {"labels": labels}, torch.empty(0).long(), torch.zeros_like(labels))


def augment(channels: int = 3, **changes) -> Augment:
    whole = {"image_size": (20, 20), "crop_scale": (1.0, 1.0), "crop_aspect": (1.0, 1.0), "flip": False}
    return Augment(**whole | {"mean": (0.0,) * channels, "std": (1.0,) * channels} | changes)


def colour(channels: int = 3, **changes: float) -> Colour:
    return Colour(**{"channels": channels, "jitter": 0.0, "grayscale": 0.0, "blur": 0.0, "solarize": 0.0} | changes)


def column(*values: float) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1, 1)


def test_jitter_equals_the_operations_of_torchvision_in_order() -> None:
    clips, factors, turns = pixels(), [0.6, 0.8, 1.0, 1.1, 1.3, 1.4], [-0.1, -0.04, 0.0, 0.03, 0.06, 0.1]
    changed = jitter(
        clips,
        brightness=column(*factors),
        contrast=column(*factors[::-1]),
        saturation=column(*factors),
        hue=column(*turns),
    )
    for i, (factor, turn) in enumerate(zip(factors, turns, strict=True)):
        expected = reference.adjust_contrast(
            reference.adjust_brightness(clips[i, :, 0] / 255, factor), factors[::-1][i]
        )
        expected = reference.adjust_hue(reference.adjust_saturation(expected, factor), turn)
        torch.testing.assert_close(changed[i, :, 0] / 255, expected, atol=1e-5, rtol=0)


def test_hue_is_the_same_after_a_whole_turn_and_grey_is_unchanged() -> None:
    clips = pixels()
    torch.testing.assert_close(rotate_hue(clips, column(*[1.0] * 6)), clips, atol=1e-3, rtol=0)
    grey = luma(clips).expand_as(clips)
    assert torch.equal(rotate_hue(grey, column(*[0.3] * 6)), grey)
    red = torch.tensor([200.0, 40.0, 40.0]).view(1, 3, 1, 1, 1)
    torch.testing.assert_close(rotate_hue(red, column(1 / 3)).flatten(), torch.tensor([40.0, 200.0, 40.0]))


def test_blur_equals_torchvisions_away_from_the_edges_and_keeps_constant_pictures() -> None:
    clips, sigma = pixels(3, side=40), torch.tensor([0.5, 1.0, 2.0])
    changed = blur(clips, sigma)
    for i, width in enumerate(sigma.tolist()):
        expected = reference.gaussian_blur(clips[i, :, 0], [19, 19], [width, width])
        torch.testing.assert_close(changed[i, :, 0, 9:-9, 9:-9], expected[:, 9:-9, 9:-9], atol=0.01, rtol=0)
    torch.testing.assert_close(blur(torch.full_like(clips, 7.0), sigma), torch.full_like(clips, 7.0))


def test_solarised_and_grey_rows_equal_torchvisions() -> None:
    clips, always = pixels(), torch.zeros(6, NUM_DRAWS)
    changed = colour(solarize=1.0)(clips.clone(), always)
    torch.testing.assert_close(changed[:, :, 0], reference.solarize(clips[:, :, 0] / 255, 128 / 255) * 255)
    grey = colour(grayscale=1.0)(clips.clone(), always)
    torch.testing.assert_close(grey[:, :, 0], reference.rgb_to_grayscale(clips[:, :, 0], 3), atol=0.02, rtol=0)


@pytest.mark.parametrize("name", SHARES)
def test_a_strength_of_zero_changes_no_bit(name: str) -> None:
    batch = raw(pixels())
    plain = augment()(batch, seeded()).clips
    assert torch.equal(augment(**{name: 0.0})(batch, seeded()).clips, plain)
    assert not torch.equal(augment(**{name: 1.0})(batch, seeded()).clips, plain)


def test_no_random_numbers_are_drawn_if_all_strengths_are_zero() -> None:
    assert colour().num_draws == 0
    generators = seeded(), seeded()
    augment()(raw(pixels()), generators[0])
    torch.rand(6, 1, 23, generator=generators[1])
    assert torch.equal(generators[0].get_state(), generators[1].get_state())


def test_all_frames_of_a_clip_change_alike() -> None:
    still = pixels().expand(-1, -1, 3, -1, -1)
    clips = augment(**SHARES)(raw(still), seeded()).clips
    torch.testing.assert_close(clips, clips[:, :, :1].expand_as(clips))
    torch.testing.assert_close(clips[:, :, :1], augment(**SHARES)(raw(still[:, :, :1]), seeded()).clips)


def test_every_view_has_its_own_colours_for_any_batch_size() -> None:
    batch = raw(pixels(rows=5))
    clips = augment(**SHARES, views=2)(batch, seeded()).clips
    assert len({clip.numpy().tobytes() for clip in clips}) == 10
    part = batch.map(lambda tensor: tensor[:2])
    torch.testing.assert_close(augment(**SHARES, views=2)(part, seeded()).clips, clips[:4])


def test_shares_are_the_configured_ones_and_strengths_stay_in_bounds() -> None:
    batch = raw(torch.full((1000, 3, 1, 4, 4), 100.0))
    small = {"image_size": (4, 4)}
    moved = augment(**small, jitter=1.0)(batch, seeded()).clips[:, :, 0, 0, 0] * 255
    changed = (moved - 100).abs().amax(dim=1) > 1e-3
    assert 0.75 < changed.float().mean() < 0.85
    assert 59.9 < moved.min() < 63
    assert 137 < moved.max() < 140.1
    tinted = raw(torch.tensor([200.0, 100.0, 50.0]).view(1, 3, 1, 1, 1).expand(1000, -1, 1, 4, 4))
    grey = augment(**small, grayscale=0.3)(tinted, seeded()).clips[:, :, 0, 0, 0]
    assert 0.25 < (grey[:, 0] == grey[:, 1]).float().mean() < 0.35


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels_have_brightness_and_contrast(channels: int) -> None:
    clips = pixels(channels=channels)
    changed = jitter(
        clips,
        brightness=column(*[0.5] * 6),
        contrast=column(*[0.5] * 6),
        saturation=column(*[0.0] * 6),
        hue=column(*[0.5] * 6),
    )
    mean = clips.mean(dim=(1, 2, 3, 4), keepdim=True)
    torch.testing.assert_close(changed, 0.25 * clips + 0.25 * mean)
    assert augment(channels, jitter=1.0)(raw(clips), seeded()).clips.shape == clips.shape


def test_grey_pictures_cannot_lose_their_colour() -> None:
    with pytest.raises(ValueError, match=r"augment\.grayscale=0\.5: pictures of 1 channels"):
        colour(channels=1, grayscale=0.5)
