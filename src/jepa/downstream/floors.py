"""What a representation must beat: raw pixels, and histograms of oriented gradients (Dalal and Triggs 2005)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from jepa.layers.probe_samples import PIXELS_SIDE, raw_pixels
from jepa.types import RunError

ORIENTATIONS, CELLS, BLOCK = 9, 8, 2

PIXELS = f"raw pixels from 0 to 1, averaged over frames, reduced to at most {PIXELS_SIDE} a side"
HOG = (
    f"histograms of oriented gradients (scikit-image): {ORIENTATIONS} orientations, {CELLS} cells on the shorter side, "
    f"blocks of {BLOCK}x{BLOCK} cells normalised by L2-Hys, of each pixel the channel with the largest gradient; of "
    "clips the middle frame"
)


def pixels(pictures: Tensor) -> Tensor:
    """uint8 [b, C, T, H, W] -> float32 [b, C * h * w]"""
    return raw_pixels(pictures)


def hog(pictures: Tensor) -> Tensor:
    """uint8 [b, C, T, H, W] -> float32 [b, D]; raises RunError where scikit-image is not installed."""
    features = _scikit_image()
    middle = pictures[:, :, pictures.shape[2] // 2].permute(0, 2, 3, 1).numpy()  # [b, H, W, C]
    cell = max(2, min(pictures.shape[-2:]) // CELLS)
    found: Sequence = [
        features.hog(
            image, orientations=ORIENTATIONS, pixels_per_cell=(cell, cell), cells_per_block=(BLOCK, BLOCK),
            block_norm="L2-Hys", channel_axis=-1,
        )
        for image in middle
    ]  # fmt: skip
    return torch.stack([torch.as_tensor(vector, dtype=torch.float32) for vector in found])


def _scikit_image():
    try:
        from skimage import feature
    except ImportError as error:
        raise RunError("hog needs scikit-image: pip install 'jepa-train[eval]', or leave hog out of floors") from error
    return feature
