"""The means and deviations that pixels are normalised by: a wrong one shifts every number of a run without a word."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from jepa.data.folders import IMAGENET_STATS
from jepa.data.images import TORCHVISION
from jepa.data.transforms import Normalise

CIFAR = Path(__file__).parents[3] / "shared" / "data" / "cifar10"
PUBLISHED = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "mnist": ((0.1307,), (0.3081,)),
    "fashion_mnist": ((0.2860,), (0.3530,)),
    "stl10": ((0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713)),
}
"""to four digits, as the recipes of these data sets give them"""


def test_natural_pictures_are_normalised_as_timm_and_torchvision_normalise_imagenet() -> None:
    assert IMAGENET_STATS[3] == (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


def test_grey_pictures_are_normalised_by_the_mean_of_the_three_colours() -> None:
    for grey, colours in zip(IMAGENET_STATS[1], IMAGENET_STATS[3], strict=True):
        assert grey == pytest.approx([sum(colours) / 3], abs=5e-4)


@pytest.mark.parametrize("name", sorted(TORCHVISION))
def test_a_small_data_set_is_normalised_by_its_own_published_moments(name: str) -> None:
    _, mean, std = TORCHVISION[name]
    assert (mean, std) == PUBLISHED[name]


@pytest.mark.parametrize(("mean", "std"), [*IMAGENET_STATS.values(), *(stats for _, *stats in TORCHVISION.values())])
def test_no_deviation_is_larger_than_pixels_of_that_mean_can_have(mean: tuple, std: tuple) -> None:
    """Numbers from 0 to 1 of mean m deviate by at most sqrt(m (1 - m)), which only black and white ones do."""
    assert len(mean) == len(std)
    assert all(0 < deviation < (share * (1 - share)) ** 0.5 for share, deviation in zip(mean, std, strict=True))


@pytest.mark.skipif(not CIFAR.is_dir(), reason="the CIFAR-10 parquet files are not here")
def test_normalised_pixels_of_cifar10_have_mean_zero_and_deviation_one() -> None:
    file = next(path for path in sorted(CIFAR.rglob("*.parquet")) if "train" in path.name)
    column = next(iter(parquet.ParquetFile(file).iter_batches(2000))).column("image").to_pylist()
    pictures = np.stack([np.array(Image.open(io.BytesIO(one["bytes"]))) for one in column])
    clips = torch.from_numpy(pictures).permute(3, 0, 1, 2)[None].float()  # [1, C, T, H, W]
    deviation, mean = torch.std_mean(Normalise(*TORCHVISION["cifar10"][1:])(clips), dim=(0, 2, 3, 4))
    assert mean.abs().max() < 0.05
    assert (deviation - 1).abs().max() < 0.05
