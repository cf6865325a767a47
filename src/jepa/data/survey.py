"""A look at images before a run: how large and how colourful they are, how their classes differ, and what follows."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from jepa.config import build_with
from jepa.config.auto import NUM_LOOKED_AT, Survey
from jepa.data.loader import UNREADABLE

GREY_RANGE = 6
"""Largest difference of the channels of a pixel that still counts as grey; JPEG makes small ones."""
UNEVEN = 1.5
"""Factor over its fair share from which a class is named."""
FEW = 1000


def look(node: Mapping[str, Any]) -> Survey:
    """The survey of the data set of a node; where its channels are auto, images are read in colour.

    Raises ValueError for a data set that cannot be opened, or whose images cannot be read.
    """
    channels, loaders = node.get("channels"), logging.getLogger("jepa.data")
    level = loaders.level
    loaders.setLevel(logging.ERROR)  # the run opens it again, and says what is to be said
    try:
        dataset = build_with({**node, "channels": 3 if channels == "auto" else channels}, num_frames=1)
        if (found := survey(dataset, dataset.labels)) is None:
            raise ValueError(f"no image of those looked at can be read, as {dataset.describe(0)}")
    finally:
        loaders.setLevel(level)
    return found


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
    pixels = np.array(sizes)  # [n, 2]
    height, width = np.median(pixels, axis=0).astype(int).tolist()
    side = int(np.median(pixels.min(axis=1)))
    return Survey(len(dataset), height, width, side, sum(grey) / len(grey), dataset.channels, shares.tolist())


def advice(found: Survey, *, image_size: tuple[int, int], channels: int, jitter: float) -> Iterator[str]:
    """What the images say about settings of the run: each with its reason."""
    if found.side * 1.5 <= min(image_size):
        size = f"image_size={image_size[0]}"
        yield f"{size} enlarges images of {found.side} pixels: a smaller one is faster and loses nothing"
    if channels == 3 and found.grey > 0.9:
        changes = "; augment.jitter changes their brightness and contrast alone" if jitter else ""
        yield f"the images have no colour: dataset.channels=1 reads them as one channel, a third of the pixels{changes}"
    if len(found.class_shares) > 1 and found.class_shares[0] > UNEVEN / len(found.class_shares):
        yield "the classes are uneven: read the balanced accuracies, which count each class alike"
    if found.num_images < FEW:
        yield f"fewer than {FEW:,} images are few for pretraining: compare with run=dictionary in jepa-eval"
