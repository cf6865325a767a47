"""A look at a folder of images says what is in it, and what that speaks against."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jepa.data.images import ImageFolder
from jepa.data.survey import advice, survey


def folder_of(
    path: Path, counts: dict[str, int], *, size: tuple[int, int] = (30, 20), grey: bool = False
) -> ImageFolder:
    rng = np.random.default_rng(0)
    for name, count in counts.items():
        (path / "train" / name).mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            pixels = pixels[..., :1].repeat(3, axis=2) if grey else pixels
            Image.fromarray(pixels).save(path / "train" / name / f"{number}.png")
    return ImageFolder(root_path=str(path), image_folder="train")


def test_number_size_colour_and_classes_are_told(tmp_path: Path) -> None:
    dataset = folder_of(tmp_path, {"a": 30, "b": 10})
    found = survey(dataset, dataset.labels)
    assert str(found) == (
        "looked at 40 of 40 images: 30 x 20 pixels in the median, 0% grey; the classes have 25% to 75% of them"
    )


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ({"counts": {"a": 4, "b": 4}}, ["image_size=64 enlarges images of 20 pixels", "fewer than 1,000 images"]),
        (
            {"counts": {"a": 4}, "size": (80, 64), "grey": True},
            ["no colour: dataset.channels=1", "few"],
        ),
        ({"counts": {"a": 9, "b": 1}, "size": (64, 64)}, ["the classes are uneven", "few"]),
    ],
)
def test_what_speaks_against_a_setting_is_said(folder: dict, expected: list[str], tmp_path: Path) -> None:
    dataset = folder_of(tmp_path, **folder)
    found = survey(dataset, dataset.labels)
    assert found is not None
    said = list(advice(found, image_size=(64, 64), channels=3, jitter=0.5))
    assert len(said) == len(expected)
    for sentence, part in zip(said, expected, strict=True):
        assert part in sentence


def test_unreadable_images_are_passed_over(tmp_path: Path) -> None:
    dataset = folder_of(tmp_path, {"a": 3})
    (tmp_path / "train/a/1.png").write_bytes(b"nothing")
    found = survey(dataset, dataset.labels)
    assert found is not None
    assert (found.height, found.width) == (20, 30)
    for number in (0, 2):
        (tmp_path / f"train/a/{number}.png").write_bytes(b"nothing")
    assert survey(dataset, dataset.labels) is None
