"""Encoded images of any common format to uint8 tensors: JPEG and PNG by torchvision, other formats by Pillow."""

from __future__ import annotations

import io
import logging
import struct

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

try:
    from torchvision.io import ImageReadMode, decode_jpeg, decode_png
except ImportError:  # deprecated since torchvision 0.29
    _FAST, _COLOURS = {}, {}
else:
    # decoders by the first bytes of the file; 1.4 times as fast as Pillow on JPEGs of 500x375
    _FAST = {b"\xff\xd8\xff": decode_jpeg, b"\x89PNG\r\n\x1a\n": decode_png}
    _COLOURS = {1: ImageReadMode.GRAY, 3: ImageReadMode.RGB}
log = logging.getLogger(__name__)
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
"""Suffixes of image files."""
_MODES = {1: "L", 3: "RGB"}
_PILLOW_ERRORS = (ValueError, SyntaxError, EOFError, struct.error, IndexError, Image.DecompressionBombError)
"""Exceptions of Pillow on damaged files besides OSError."""


def decode(data: bytes, *, channels: int = 3) -> Tensor:
    """Encoded file -> uint8 [C, 1, H, W], upright by its EXIF tag; raises OSError or RuntimeError.

    Palettes, grey, CMYK and 16-bit images become `channels` = 3 (RGB) or 1 (grey) opaque channels of 8 bits.
    """
    for magic, decoder in _FAST.items():
        if data.startswith(magic):
            encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            image = decoder(encoded, _COLOURS[channels], apply_exif_orientation=True)  # uint16 for PNGs of 16 bits
            return (image if image.dtype == torch.uint8 else (image.int() >> 8).to(torch.uint8)).unsqueeze(1)
    return _decode_with_pillow(data, _MODES[channels]).unsqueeze(1)


def warn_of_slow_decoding() -> None:
    if not _FAST:
        log.warning("images are decoded by Pillow, which takes longer: this torchvision has no image decoders")


def _decode_with_pillow(data: bytes, mode: str) -> Tensor:
    try:
        with Image.open(io.BytesIO(data)) as image:
            pixels = _to_mode(ImageOps.exif_transpose(image), mode)
    except _PILLOW_ERRORS as error:
        raise OSError(f"not a readable image: {error}") from error
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1)


def _to_mode(image: Image.Image, mode: str) -> np.ndarray:
    if image.mode in ("I", "F"):
        raise ValueError(f"an image with 32 bits for each pixel (mode {image.mode}); convert it to 8 or 16 bits")
    if image.mode.startswith("I;16"):
        grey = (np.array(image).astype(np.uint16) >> 8).astype(np.uint8)
        return np.stack([grey] * len(mode), axis=-1)
    return np.array(image.convert(mode))
