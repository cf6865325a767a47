"""Encoded images of any common format to uint8 tensors: JPEG by torchvision, other formats by Pillow.

Pillow takes as long as torchvision 0.29 for a PNG, and damaged pixels do not end its process.
"""

from __future__ import annotations

import io
import logging
import os
import re
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor

from jepa.config.layouts import IMAGE_SUFFIXES
from jepa.data import tiff
from jepa.data.bands import NPY, channels_first, decode_array, num_channels, read_array, scale

JPEG, PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # deprecated since torchvision 0.29
    _FAST, _COLOURS = {}, {}
else:
    # decoders by the first bytes of the file; 1.4 times as fast as Pillow on JPEGs of 500x375
    _FAST = {JPEG: decode_jpeg}
    _COLOURS = {1: ImageReadMode.GRAY, 3: ImageReadMode.RGB}
log = logging.getLogger(__name__)
SUFFIXES = IMAGE_SUFFIXES
"""Suffixes of image files."""
WHITE = 65535
"""Largest value of 16 bits."""
MAX_CHECKED = 8
"""Number of files of a data set whose range of values is checked."""
DARK = 64
"""Of files of 16 bits, the 8-bit value from which one has to be present: below, two bits or more are unused."""
ImageSource = Tensor | np.ndarray | Image.Image | str | os.PathLike
"""An image or several in memory, or the path of a file."""
_MODES = {1: "L", 3: "RGB"}
_PILLOW_ERRORS = (ValueError, SyntaxError, EOFError, struct.error, IndexError, KeyError, TypeError)
"""Exceptions of Pillow on damaged files besides OSError."""


def decode(data: bytes, *, channels: int = 3, max_value: float | None = None) -> Tensor:
    """Encoded file -> uint8 [C, 1, H, W], upright by its EXIF tag; raises OSError or RuntimeError.

    Arrays of numpy, and pictures of other `channels` than 1 and 3, must have so many, which stay as they are.

    Palettes, grey, CMYK and images of more than 8 bits become `channels` = 3 (RGB) or 1 (grey) channels of 8 bits;
    alpha is dropped. In images of more than 8 bits white is `max_value`, by default the largest value that the file
    declares: maxval of PGM and PPM, MaxSampleValue and BitsPerSample of TIFF, all bits elsewhere. nan is black.
    """
    if data.startswith(NPY) or (channels not in _MODES and data.startswith(tiff.HEADS)):
        return decode_array(data, channels, max_value).unsqueeze(1)
    if channels not in _MODES:
        return _decode_bands(data, channels, max_value).unsqueeze(1)
    for magic, decoder in _FAST.items():
        if data.startswith(magic):
            encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            try:
                image = decoder(encoded, _COLOURS[channels], apply_exif_orientation=True)
            except RuntimeError as error:  # which begins with a place in the C++ source
                reason = str(error).rpartition(".cpp:")[2].partition(", ")[2]
                raise OSError(f"not a readable image: {reason or error}") from error
            return image.unsqueeze(1)  # pyright: ignore[reportAttributeAccessIssue]  (of one file it is no list)
    return _decode_with_pillow(data, _MODES[channels], max_value).unsqueeze(1)


def _decode_bands(data: bytes, channels: int, max_value: float | None) -> Tensor:
    """uint8 [C, H, W] of a file with exactly so many bands, as grey or RGB with alpha."""
    with _pillow_errors(data), _open(data) as image:
        pixels = channels_first(np.array(_upright(image, data, max_value)), channels)
    return torch.from_numpy(pixels.copy())


def find_channels(data: bytes) -> int:
    """The number of channels of a file; a palette counts as RGB. Raises OSError."""
    if data.startswith(NPY):
        return num_channels(read_array(data))
    with suppress(OSError), _pillow_errors(data), _open(data) as image:
        return 3 if image.mode == "P" else len(image.getbands())
    return num_channels(read_array(data))


class Header(NamedTuple):
    """What the head of an image file says."""

    size: tuple[int, int]
    """height and width as stored"""
    orientation: int
    """EXIF orientation that `decode` undoes: 1, or 2 to 8"""


def read_header(path: Path) -> Header:
    """Of a file of any size, without its pixels; raises OSError."""
    classes = {JPEG: JpegImageFile, PNG: PngImageFile} | dict.fromkeys(tiff.HEADS, TiffImageFile)
    with open(path, "rb") as file:
        head = file.read(16)
        file.seek(0)
        kind = next((kind for magic, kind in classes.items() if head.startswith(magic)), Image.open)
        with _pillow_errors(head):
            image = kind(file)  # not always by Image.open, which refuses large files
            width, height = image.size
            if isinstance(image, TiffImageFile):  # whose size is the turned one
                width, height = image.tag_v2[tiff.IMAGEWIDTH], image.tag_v2[tiff.IMAGELENGTH]
            tags = _exif(image) if head.startswith((JPEG, PNG)) else image.getexif()
    return Header((height, width), _orientation(tags))


def _orientation(tags: Image.Exif) -> int:
    value = tags.get(ExifTags.Base.Orientation, 1)
    return int(value) if value in range(2, 9) else 1


def _exif(image: ImageFile) -> Image.Exif:
    """Of a JPEG or PNG, without damaged tags and without an orientation in XMP."""
    tags = Image.Exif()
    with suppress(*_PILLOW_ERRORS):
        tags.load(image.info.get("exif", b""))
    return tags


def as_pixels(image: object, channels: int) -> Tensor:
    """A path or an image of Pillow -> uint8 [C, H, W]; an array [..., H, W, C] -> [..., C, H, W]; a tensor as it is.

    Raises OSError or RuntimeError for a file that cannot be read, ValueError for anything that is no image.
    """
    if isinstance(image, Tensor):
        return image
    if isinstance(image, str | os.PathLike):
        try:
            return decode(Path(image).expanduser().read_bytes(), channels=channels).squeeze(1)
        except (OSError, RuntimeError) as error:
            raise OSError(f"{os.fspath(image)}: {getattr(error, 'strerror', None) or error}") from error
    if isinstance(image, Image.Image):
        if image.mode in ("I", "F") or image.mode.startswith("I;"):
            raise ValueError(
                f"an image of Pillow of mode {image.mode}; scale it to 8 bits, or give the path of its file"
            )
        upright = ImageOps.exif_transpose(image)
        image = np.atleast_3d(np.array(upright.convert(_MODES[channels]) if channels in _MODES else upright))
    if not isinstance(image, np.ndarray):
        raise ValueError(f"expected a tensor, an array, an image of Pillow or a path, not {type(image).__name__}")
    if image.ndim not in (3, 4) or image.shape[-1] != channels:
        raise ValueError(f"an array of shape {image.shape}; expected [H, W, {channels}] or [B, H, W, {channels}]")
    return torch.from_numpy(np.ascontiguousarray(image)).movedim(-1, -3)


def dark_images_warning(read: Callable[[int], bytes], num_files: int, channels: int = 3) -> str | None:
    """The end of a warning if files of 16 bits, which declare no range, leave two of them or more unused, else None.

    `read` gives the contents of a file by its number.
    """
    brightest = -1
    for number in np.linspace(0, num_files - 1, min(MAX_CHECKED, num_files)).astype(int).tolist():
        try:
            data = read(number)
            is_deep = _has_white_of_16_bits(data, channels)
            brightest = max(brightest, int(decode(data, channels=channels).max())) if is_deep else brightest
        except (OSError, RuntimeError):
            continue  # reported when the sample is read
    if not 0 <= brightest < DARK:
        return None
    white = 256 * 2 ** brightest.bit_length() - 1
    return (
        f"has 16 bits and no value above {white}, as the other images looked at: with white at {WHITE} they are dark. "
        f"If white is {white}, set dataset.max_value={white}; dataset.max_value={WHITE} keeps them dark"
    )


def _has_white_of_16_bits(data: bytes, channels: int) -> bool:
    if data.startswith(NPY) or (channels not in _MODES and data.startswith(tiff.HEADS)):
        return read_array(data).dtype == np.uint16
    with _pillow_errors(data), _open(data) as image:
        return _declared_white(image) == WHITE


def warn_of_slow_decoding() -> None:
    if not _FAST:
        log.warning("images are decoded by Pillow, which takes longer: this torchvision has no image decoders")


def _whole_png(data: bytes) -> bytes:
    """Without comments and the like whose checksum is wrong. Raises OSError if that of anything else is.

    Pillow does not compare that of pixels.
    """
    begin, whole = 8, True
    parts = [data[:8]]
    while begin + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, begin)
        end = begin + 12 + length
        is_good = end > len(data) or zlib.crc32(data[begin + 4 : end - 4]) == int.from_bytes(data[end - 4 : end])
        if not is_good and kind[:1].isupper():
            raise OSError("a damaged PNG: its checksum is wrong")
        parts += [data[begin:end]] if is_good else []
        begin, whole = end, whole and is_good
    return data if whole else b"".join([*parts, data[begin:]])


def _decode_with_pillow(data: bytes, mode: str, max_value: float | None) -> Tensor:
    with _pillow_errors(data), _open(data) as image:
        pixels = np.array(_upright(image, data, max_value).convert(mode))
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1)


@contextmanager
def _pillow_errors(data: bytes) -> Iterator[None]:
    """Raises OSError for whatever Pillow raises."""
    try:
        yield
    except Image.UnidentifiedImageError as error:
        brand = f"of the type {data[8:12].decode('latin-1').strip()}" if data[4:8] == b"ftyp" else "of no known type"
        raise OSError(f"not a readable image: {brand}; save it as JPEG or PNG" if data else "an empty file") from error
    except Image.DecompressionBombError as error:
        raise OSError("an image of more than 179 megapixels; scale it down or cut it into tiles") from error
    except _PILLOW_ERRORS as error:
        raise OSError(f"not a readable image: {error}") from error


def _open(data: bytes) -> ImageFile:
    if data.startswith(PNG):
        return _open_png(data)
    return tiff.open_tiff(data) if data.startswith(tiff.HEADS) else Image.open(io.BytesIO(data))


def _open_png(data: bytes) -> PngImageFile:
    """Of any size up to that of a TIFF: `Image.open` refuses large ones. Raises OSError or ValueError."""
    image = PngImageFile(io.BytesIO(_whole_png(data)))
    if (size := image.width * image.height) > tiff.MAX_PIXELS:
        raise ValueError(f"a PNG of {size:,} pixels, more than {tiff.MAX_PIXELS:,}; scale it down or cut it into tiles")
    tags = Image.Exif()  # as `read_header` says; Pillow would also read on for it, and take one of XMP
    tags[ExifTags.Base.Orientation] = _orientation(_exif(image))
    image.info["exif"] = tags.tobytes()
    return image


def _upright(image: ImageFile, data: bytes, max_value: float | None) -> Image.Image:
    """The image with at most 8 bits for each value, upright by its EXIF tag."""
    white = max_value or _declared_white(image)
    if white is None:
        kind = "floating-point numbers" if image.mode == "F" else "signed numbers or numbers of 32 bits"
        raise ValueError(f"its values are {kind}: set dataset.max_value to the value of white")
    if image.format == "PPM" and image.mode != "F" and _maxval(image) > 255:
        return Image.fromarray(scale(_pnm_values(image, data), white))
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return Image.fromarray(_grey(image, white))
    if _has_sixteen_bits(image) and white != WHITE:
        return Image.fromarray(scale(_all_sixteen_bits(image, data), white), image.mode)
    upright = ImageOps.exif_transpose(image)
    return upright.convert("LA") if upright.mode == "La" else upright


def _declared_white(image: ImageFile) -> int | None:
    """The largest value that the file can have by its own account, None if it says nothing."""
    if image.mode == "F" or (image.mode == "I" and isinstance(image, TiffImageFile)):
        return None
    if image.format == "PPM":
        return _maxval(image)
    if isinstance(image, TiffImageFile):
        return tiff.declared_white(image.tag_v2)
    return WHITE if image.mode.startswith("I") or _has_sixteen_bits(image) else 255


def _raw_mode(image: ImageFile) -> str:
    """Pillow's name for the layout of the encoded values, such as RGB;16B."""
    arguments = image.tile[0].args if image.tile else None
    return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments)


def _has_sixteen_bits(image: ImageFile) -> bool:
    return re.search(r";16[BLN]$", _raw_mode(image)) is not None


def _grey(image: ImageFile, white: float) -> np.ndarray:
    """uint8 [H, W] of an image of one band of more than 8 bits."""
    tags = image.tag_v2 if isinstance(image, TiffImageFile) else None
    values = np.array(ImageOps.exif_transpose(image))
    if image.mode == "I" and tags is not None and tiff.is_unsigned(tags):
        values = values.view(np.uint32)
    grey = scale(values, white)
    return 255 - grey if tags is not None and tiff.is_white_zero(tags) else grey


def _all_sixteen_bits(image: ImageFile, data: bytes) -> np.ndarray:
    """uint16 [H, W, bands]: Pillow gives the upper eight bits, and the lower ones if it takes the bytes for swapped."""
    raw_mode = _raw_mode(image)
    if raw_mode.startswith("RGBa"):
        raise ValueError("16 bits with premultiplied alpha; save it without alpha")
    order = raw_mode[-1].replace("N", "L" if sys.byteorder == "little" else "B")
    swapped = raw_mode[:-1] + ("B" if order == "L" else "L")
    with _open(data) as lower:
        arguments = ((tile.args, swapped) for tile in lower.tile)
        arguments = [(new, *old[1:]) if isinstance(old, tuple) else new for old, new in arguments]
        lower.tile = [tile._replace(args=new) for tile, new in zip(lower.tile, arguments, strict=True)]
        high, low = (np.array(ImageOps.exif_transpose(half)).astype(np.uint16) for half in (image, lower))
    return high << 8 | low


def _maxval(image: ImageFile) -> int:
    """Value of white in a PBM, PGM or PPM."""
    codec, _, _, arguments = image.tile[0]
    if codec.startswith("ppm") and isinstance(arguments, tuple):
        return int(arguments[1])
    return WHITE if arguments == "I;16B" else 255


def _pnm_values(image: ImageFile, data: bytes) -> np.ndarray:
    """[H, W] or [H, W, 3] of a PGM or PPM of more than 8 bits, which Pillow reads as other values."""
    shape = (image.height, image.width, *([3] if image.mode == "RGB" else []))
    count, offset = int(np.prod(shape)), image.tile[0].offset
    if data[1:2] in b"56":
        return np.frombuffer(data, ">u2", count, offset).astype(np.uint16).reshape(shape)
    numbers = re.sub(rb"#[^\r\n]*", b"", data[offset:]).split()[:count]
    return np.array([int(number) for number in numbers], dtype=np.int64).reshape(shape)
