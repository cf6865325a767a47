"""Normalising and its way back, and the smallest pictures."""

import pytest
import torch

from jepa.data.folders import IMAGENET_STATS
from jepa.data.images import TORCHVISION
from jepa.data.transforms import Augment, EvalTransform, Normalise
from jepa.types import RawBatch


@pytest.mark.parametrize(("mean", "std"), [*IMAGENET_STATS.values(), *(stats for _, *stats in TORCHVISION.values())])
def test_every_grey_level_survives_normalising_and_its_way_back(mean: tuple, std: tuple) -> None:
    levels = torch.arange(256, dtype=torch.uint8).expand(len(mean), 1, 16, 256)
    normalise = Normalise(mean, std)
    assert torch.equal(normalise.undo(normalise(levels.float())), levels)


def test_predictions_outside_of_the_range_of_pixels_are_shown_at_its_ends() -> None:
    normalise = Normalise((0.5,), (0.25,))
    extremes = torch.tensor([-99.0, 99.0, float("nan"), float("inf"), -float("inf")]).view(1, 1, 1, 5)
    assert normalise.undo(extremes).flatten().tolist() == [0, 255, 0, 255, 0]


def test_a_picture_of_one_pixel_is_a_picture() -> None:
    pixels = torch.tensor([10, 20, 30], dtype=torch.uint8).view(1, 3, 1, 1, 1)
    settings = {"image_size": (1, 1), "mean": (0.0,) * 3, "std": (1.0,) * 3}
    expected = pixels / 255
    torch.testing.assert_close(EvalTransform(**settings)(pixels), expected)
    none = torch.empty(0, dtype=torch.long)
    raw = RawBatch(pixels, torch.ones(1, 2, dtype=torch.long), {"labels": torch.tensor([-1])}, none, torch.zeros(1))
    augment = Augment(**settings, crop_scale=(0.3, 1.0), crop_aspect=(0.75, 4 / 3), flip=True)
    torch.testing.assert_close(augment(raw, torch.Generator().manual_seed(0)).clips, expected)


@pytest.mark.parametrize("size", [(8,), (8, 8, 8), (0, 8), (8, -1)])
def test_an_image_size_that_is_no_height_and_width_is_refused(size: tuple) -> None:
    with pytest.raises(ValueError, match="image_size"):
        EvalTransform(image_size=size, mean=(0.5,), std=(0.5,))
