"""Shapes: determinism, balance and statistics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from checked import checked
from torch import Tensor

from jepa.data.embedded import KINDS, MAX_RADIUS, Shapes

SIDE = 32


def pictures(dataset: Shapes, count: int) -> Tensor:
    """-> float [count, 3, side, side] in [0, 1]"""
    return torch.stack([dataset[index][0][:, 0] for index in range(count)]).float() / 255


def test_a_picture_is_pure_in_seed_and_index() -> None:
    first, second = Shapes(side=SIDE, seed=3), Shapes(side=SIDE, seed=3, num_samples=50)
    backwards = {index: second[index] for index in reversed(range(20))}
    for index in range(20):
        clip, label = first[index]
        assert clip.equal(backwards[index][0])
        assert label == backwards[index][1]
        assert clip.equal(first[index][0]), "drawn again"
    assert not first[0][0].equal(Shapes(side=SIDE, seed=4)[0][0])


def test_changing_a_returned_picture_does_not_change_the_data_set() -> None:
    dataset = Shapes(side=SIDE)
    clip, _ = dataset[5]
    before = clip.clone()
    clip.zero_()
    assert dataset[5][0].equal(before)


@pytest.mark.parametrize("side", [8, 32, 225])
def test_pictures_are_clips_of_one_frame_at_any_side(side: int) -> None:
    clip, label = Shapes(side=side)[7]
    assert clip.shape == (3, 1, side, side)
    assert clip.dtype == torch.uint8
    assert isinstance(label, int)


def test_the_side_changes_the_resolution_and_nothing_else() -> None:
    fine, coarse = pictures(Shapes(side=128), 20), pictures(Shapes(side=SIDE), 20)
    reduced = torch.nn.functional.avg_pool2d(fine, 4)
    assert (reduced - coarse).abs().mean() < 0.02
    assert torch.corrcoef(torch.stack([reduced.flatten(), coarse.flatten()]))[0, 1] > 0.98


def test_the_kinds_alternate() -> None:
    dataset = Shapes(num_samples=5 * len(KINDS), side=8)
    labels = torch.tensor([dataset[index][1] for index in range(len(dataset))])
    assert torch.bincount(labels).tolist() == [5] * len(dataset.classes)
    assert dataset.classes[dataset[1][1]] in dataset.describe(1)


def test_the_held_out_part_shows_other_pictures_of_the_same_kinds() -> None:
    dataset = Shapes(num_samples=200, val_samples=100, side=SIDE)
    held_out = dataset.validation()
    assert held_out is not None
    assert held_out.validation() is None
    assert (len(held_out), held_out.classes) == (100, dataset.classes)
    training = {dataset[index][0].numpy().tobytes() for index in range(len(dataset))}
    validation = {held_out[index][0].numpy().tobytes() for index in range(len(held_out))}
    assert len(training) == 200
    assert len(validation) == 100
    assert not training & validation


@pytest.mark.parametrize("field", KINDS)
def test_every_kind_covers_the_same_area_and_stays_within_its_circle(field) -> None:
    pixels = np.linspace(-2, 2, 801, dtype=np.float32)
    x, y = np.meshgrid(pixels, pixels)
    inside = field(x, y) < 0
    assert inside.mean() * 16 == pytest.approx(np.pi, rel=0.02)
    assert np.hypot(x, y)[inside].max() < MAX_RADIUS


def test_the_mean_colour_is_independent_of_the_kind() -> None:
    dataset = Shapes(side=SIDE)
    means = pictures(dataset, 600).mean(dim=(1, 2, 3))
    by_kind = means.unflatten(0, (-1, len(KINDS)))  # [60, kinds]
    deviation = by_kind.mean(0) - means.mean()
    assert (deviation.abs() < 4 * means.std() / 60**0.5).all()


def test_normalised_pixels_stay_within_two_of_zero() -> None:
    sample = pictures(Shapes(side=SIDE), 50)
    normalised = (sample - torch.tensor(Shapes.mean)[:, None, None]) / torch.tensor(Shapes.std)[:, None, None]
    assert normalised.abs().max() < 2
    assert normalised.std() > 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_samples": 0}, "num_samples=0"),
        ({"val_samples": 0}, "val_samples=0"),
        ({"side": 4}, "side=4: must be from 8 to 1024"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_impossible_sizes_are_refused_by_value_and_bound(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checked(Shapes, **changes)


def test_an_index_beyond_the_end_is_refused() -> None:
    with pytest.raises(IndexError, match="index 10 of 10"):
        Shapes(num_samples=10)[10]
