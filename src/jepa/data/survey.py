"""A look at images before a run: how large and how colourful they are, how their classes differ, and what follows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from jepa.data.loader import UNREADABLE

NUM_LOOKED_AT = 48
GREY_RANGE = 6
"""Largest difference of the channels of a pixel that still counts as grey; JPEG makes small ones."""
UNEVEN = 1.5
"""Factor over its fair share from which a class is named."""
FEW = 1000


class Survey(NamedTuple):
    num_images: int
    height: int
    """median of the images looked at, as is the width"""
    width: int
    grey: float
    """share of images without colour"""
    class_shares: np.ndarray
    """share of each class among the labelled images, largest first"""

    def __str__(self) -> str:
        text = f"looked at {min(NUM_LOOKED_AT, self.num_images)} of {self.num_images:,} images: "
        text += f"{self.width} x {self.height} pixels in the median, {self.grey:.0%} grey"
        if len(self.class_shares) > 1:
            text += f"; the classes have {self.class_shares[-1]:.0%} to {self.class_shares[0]:.0%} of them"
        return text


def survey(dataset: Any, labels: np.ndarray) -> Survey | None:
    """None if no image that was looked at can be read."""
    chosen = np.linspace(0, len(dataset) - 1, min(NUM_LOOKED_AT, len(dataset))).astype(int)
    sizes, grey = [], []
    for index in chosen.tolist():
        try:
            image = dataset[index][0][:, 0]  # [C, H, W]
        except UNREADABLE:
            continue  # reported when the sample is read
        sizes.append(image.shape[1:])
        difference = image.int().amax(0) - image.int().amin(0)
        grey.append(bool(torch.quantile(difference.flatten()[:100_000].float(), 0.99) <= GREY_RANGE))
    if not sizes:
        return None
    counts = np.bincount(labels[labels >= 0]) if (labels >= 0).any() else np.zeros(0, dtype=int)
    shares = np.sort(counts[counts > 0])[::-1] / max(1, counts.sum())
    height, width = np.median(np.array(sizes), axis=0).astype(int).tolist()
    return Survey(len(dataset), height, width, sum(grey) / len(grey), shares)


def advice(found: Survey, *, image_size: tuple[int, int], channels: int, jitter: float) -> Iterator[str]:
    """What the images say about settings of the run: each with its reason."""
    if min(found.height, found.width) * 1.5 <= min(image_size):
        side = min(found.height, found.width)
        yield f"image_size={image_size[0]} enlarges images of {side} pixels: a smaller one is faster and loses nothing"
    if channels == 3 and found.grey > 0.9:
        changes = "; augment.jitter changes their brightness and contrast alone" if jitter else ""
        yield f"the images have no colour: dataset.channels=1 reads them as one channel, a third of the pixels{changes}"
    if len(found.class_shares) > 1 and found.class_shares[0] > UNEVEN / len(found.class_shares):
        yield "the classes are uneven: read the balanced accuracies, which count each class alike"
    if found.num_images < FEW:
        yield f"fewer than {FEW:,} images are few for pretraining: compare with run=dictionary in jepa-eval"
