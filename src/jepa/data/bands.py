"""Pictures of 1 to 16 channels that are no colours: arrays of numpy and TIFF files, and what their channels measure."""

from __future__ import annotations

import io
import struct
import tokenize
import zlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

NPY = b"\x93NUMPY"
MAX_CHANNELS = 16
DAMAGE = (
    *(ValueError, EOFError, TypeError, AttributeError, LookupError, RuntimeError, ArithmeticError, MemoryError),
    *(struct.error, zlib.error, tokenize.TokenError),
)
"""Exceptions of numpy and tifffile on damaged files besides OSError; sizes in their heads may ask for any memory."""
WHITES = {np.dtype(bool): 1, np.dtype(np.uint8): 255, np.dtype(np.uint16): 65535}
"""Type of the values -> the largest of them."""
NUM_MEASURED = 256
"""Number of files from which statistics are measured."""
MIN_STD = 1 / 255
"""Smallest standard deviation of a channel, in shares of white."""


def decode_array(data: bytes, channels: int, max_value: float | None) -> Tensor:
    """An .npy or TIFF file -> uint8 [C, H, W]; raises OSError. White is `max_value`, or the largest of the type."""
    return torch.from_numpy(scale(channels_first(read_array(data), channels), max_value).copy())


def read_array(data: bytes) -> np.ndarray:
    """The array of an .npy or TIFF file. Raises OSError if it is damaged, or if a package is missing."""
    try:
        if data.startswith(NPY):
            return np.load(io.BytesIO(data), allow_pickle=False)
        import tifffile

        return tifffile.imread(io.BytesIO(data))
    except ImportError as error:
        raise OSError(f"TIFF files of other channels than 1 and 3: pip install 'jepa-train[tiff]' ({error})") from error
    except DAMAGE as error:
        raise OSError(f"not a readable array: {error}") from error


def channels_first(values: np.ndarray, channels: int) -> np.ndarray:
    """[H, W], [H, W, C] or [C, H, W] -> [C, H, W]. Raises OSError for another number of channels."""
    if values.ndim == 2 and channels == 1:
        return values[None]
    if values.ndim == 3 and values.shape[-1] == channels:
        return np.moveaxis(values, -1, 0)
    if values.ndim == 3 and values.shape[0] == channels:
        return values
    raise OSError(
        f"an array of shape {list(values.shape)}, not [H, W, {channels}] or [{channels}, H, W]; dataset.channels "
        "is the number of channels, null that of the first file"
    )


def num_channels(values: np.ndarray) -> int:
    """Of an array [H, W], [H, W, C] or [C, H, W] with C at most 16. Raises OSError for other shapes."""
    side = 1 if values.ndim == 2 else min(values.shape[0], values.shape[-1]) if values.ndim == 3 else 0
    if 0 < side <= MAX_CHANNELS:
        return side
    raise OSError(f"an array of shape {list(values.shape)} is no picture of 1 to {MAX_CHANNELS} channels")


def scale(values: np.ndarray, max_value: float | None) -> np.ndarray:
    """Values from 0 to white in 256 equal steps, uint8: of 16 bits the upper eight. Raises OSError without a white."""
    white = max_value or WHITES.get(values.dtype)
    if white is None:
        raise OSError(f"its values are of type {values.dtype}: set dataset.max_value to the value of white")
    if values.dtype == np.uint8 and white == 255:
        return values
    if values.dtype == np.uint16 and white == WHITES[values.dtype]:
        return (values >> 8).astype(np.uint8)
    shares = np.nan_to_num(np.clip(values.astype(np.float64) / white, 0, 1))
    return np.minimum(shares * 256, 255).astype(np.uint8)


def measure(read: Callable[[int], Tensor], num_samples: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel in [0, 1], over 256 evenly spaced samples; always the same.

    `read` gives uint8 [C, ...]. Raises ValueError if none of them can be read.
    """
    sums, squares, count = 0.0, 0.0, 0
    for index in np.linspace(0, num_samples - 1, min(NUM_MEASURED, num_samples)).astype(int).tolist():
        try:
            pixels = read(index).flatten(1).double() / 255
        except (OSError, RuntimeError):
            continue  # reported when the sample is read
        sums, squares, count = sums + pixels.sum(1), squares + pixels.square().sum(1), count + pixels.shape[1]
    if not count:
        raise ValueError("none of the files that were looked at can be read, so nothing is known of their channels")
    mean = torch.as_tensor(sums) / count
    std = (torch.as_tensor(squares) / count - mean.square()).clamp(min=0).sqrt().clamp(min=MIN_STD)
    return tuple(round(value, 4) for value in mean.tolist()), tuple(round(value, 4) for value in std.tolist())


def show(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.3g}" for value in values)
