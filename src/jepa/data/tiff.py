"""TIFF files for Pillow: what it would read wrongly is refused, and what they declare about their values."""

from __future__ import annotations

import io
import math

from PIL import Image, TiffImagePlugin
from PIL.TiffImagePlugin import (
    BITSPERSAMPLE,
    EXTRASAMPLES,
    IMAGELENGTH,
    IMAGEWIDTH,
    PHOTOMETRIC_INTERPRETATION,
    PLANAR_CONFIGURATION,
    SAMPLEFORMAT,
    SAMPLESPERPIXEL,
)

HEADS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""First bytes of a file."""
MAX_PIXELS = 1 << 29
"""Largest number of pixels; as RGB they take 1.6 GB."""
NUM_COLOURS = {2: 3, 5: 4, 6: 3, 8: 3}
"""Bands of RGB, CMYK, YCbCr and LAB by PhotometricInterpretation; others have one."""
MAX_SAMPLE_VALUE, WHITE_IS_ZERO, RGB, SEPARATE_PLANES, UNSIGNED, SIGNED = 281, 0, 2, 2, 1, 2

Tags = TiffImagePlugin.ImageFileDirectory_v2


def open_tiff(data: bytes) -> TiffImagePlugin.TiffImageFile:
    """Pillow's image, of any size up to MAX_PIXELS, whose pixels are not decoded yet.

    Raises ValueError for files that Pillow cannot read, reads wrongly, or whose bands have no meaning as colours.
    """
    tags = _read_tags(data)
    bits, bands = max(tags.get(BITSPERSAMPLE, (1,))), _num_bands(tags)
    size = math.prod(tags.get(tag, 0) for tag in (IMAGEWIDTH, IMAGELENGTH))
    if bands > _num_colours(tags) + _has_alpha(tags, bands):
        raise ValueError(f"a TIFF of {bands} bands; save it with 1 (grey) or 3 (RGB) of them, with or without alpha")
    if bits <= 8 and max(tags.get(SAMPLEFORMAT, (UNSIGNED,))) == SIGNED:
        raise ValueError("a TIFF of signed values; save it with values from 0 on")
    if bits > 8 and bands > 1 and tags.get(PLANAR_CONFIGURATION) == SEPARATE_PLANES:
        raise ValueError(f"a TIFF with bands of {bits} bits in separate planes; save it with interleaved bands")
    if size > MAX_PIXELS:
        raise ValueError(f"a TIFF of {size:,} pixels, more than {MAX_PIXELS:,}; scale it down or cut it into tiles")
    try:
        return _LargeTiff(io.BytesIO(data))
    except SyntaxError as error:
        kind = f"a TIFF of {bands} band{'s' * (bands > 1)} of {bits} bits that Pillow cannot read ({error})"
        raise ValueError(f"{kind}; save it as grey or RGB of 8 or 16 bits") from error


class _LargeTiff(TiffImagePlugin.TiffImageFile):
    """A TIFF without Pillow's limit of 179 megapixels."""

    def load_prepare(self) -> None:
        if self._im is None:
            self.im = Image.core.new(self.mode, getattr(self, "_tile_size", self.size))  # else checked and made there
        super().load_prepare()


def declared_white(tags: Tags) -> int:
    """The largest value by the number of bits, or MaxSampleValue if that is the largest of a smaller number of bits.

    Any other MaxSampleValue is the brightest pixel of one image and says nothing about white.
    """
    largest, declared = 2 ** max(tags.get(BITSPERSAMPLE, (1,))) - 1, tags.get(MAX_SAMPLE_VALUE, 0)
    declared = max(declared) if isinstance(declared, tuple) else declared
    is_depth = 255 <= declared <= largest and not declared & (declared + 1)
    return declared if is_depth else largest


def is_white_zero(tags: Tags) -> bool:
    return tags.get(PHOTOMETRIC_INTERPRETATION, WHITE_IS_ZERO) == WHITE_IS_ZERO


def is_unsigned(tags: Tags) -> bool:
    return max(tags.get(SAMPLEFORMAT, (UNSIGNED,))) == UNSIGNED


def _read_tags(data: bytes) -> Tags:
    """Tags of the first image in the file."""
    stream = io.BytesIO(data)
    tags = Tags(stream.read(16 if b"+" in data[:4] else 8))
    stream.seek(tags.next)
    tags.load(stream)
    return tags


def _num_colours(tags: Tags) -> int:
    return NUM_COLOURS.get(tags.get(PHOTOMETRIC_INTERPRETATION, WHITE_IS_ZERO), 1)


def _num_bands(tags: Tags) -> int:
    return tags.get(SAMPLESPERPIXEL, _num_colours(tags))


def _has_alpha(tags: Tags, bands: int) -> bool:
    """True if one more band is alpha; a fourth one of RGB need not be declared as such."""
    is_rgb = tags.get(PHOTOMETRIC_INTERPRETATION) == RGB
    return bands == _num_colours(tags) + 1 and (is_rgb or tags.get(EXTRASAMPLES, (0,)) != (0,))
