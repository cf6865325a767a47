"""The pixels that boxes count: those of the image as stored in its file, or as turned by its EXIF tag."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from os.path import isfile
from pathlib import Path
from typing import Literal, NamedTuple

from jepa.data.box_files import Account, Annotated
from jepa.data.decode import Header, read_header

ExifReading = Literal["auto", "stored", "turned"]
MIRRORED_COLUMNS, MIRRORED_ROWS = (2, 3, 6, 7), (3, 4, 7, 8)
"""EXIF orientations that mirror the columns or rows, after rows and columns are exchanged from TRANSPOSED on."""
TRANSPOSED = 5


class Upright(NamedTuple):
    """An image with its boxes as `decode` turns it."""

    image: Annotated
    size: tuple[int, int]
    """height and width"""


def upright(images: Sequence[Annotated], exif: ExifReading, account: Account) -> list[Upright]:
    """The images with the sizes of their files, upright. Those that cannot be read or have another size are left out.

    With "auto" the annotated size says whether boxes count pixels as stored or as turned; where it cannot, they are
    taken as most others of these images, and as turned if no size tells.
    """
    pairs = _readable(images, account)
    readings = [_reading(image.size, header) if exif == "auto" else exif for image, header in pairs]
    counts = Counter(readings)
    assumed = "stored" if counts["stored"] > counts["turned"] else "turned"
    results = []
    for (image, header), reading in zip(pairs, readings, strict=True):
        if header.orientation != 1:
            why = f"dataset.exif={exif}" if exif != "auto" else "by their annotated sizes" if reading else "assumed"
            account.add(f"images with an EXIF orientation, boxes taken as {reading or assumed} ({why})", image.path)
            if (reading or assumed) == "stored":
                image = image._replace(boxes=[box._replace(edges=_turned(box.edges, header)) for box in image.boxes])
        results.append(Upright(image, _turned_size(header)))
    return results


def _readable(images: Sequence[Annotated], account: Account) -> list[tuple[Annotated, Header]]:
    """The images whose files have one of the two sizes that their annotation may mean."""
    pairs = []
    with ThreadPoolExecutor() as pool:
        headers = pool.map(_header, [image.path for image in images])
    for image, header in zip(images, headers, strict=True):
        if header is None:
            account.add("images without a file left out", image.path)
        elif isinstance(header, OSError):
            account.add("images that cannot be read left out", f"{image.path}: {header.strerror or header}")
        elif image.size in (None, header.size, _turned_size(header)):
            pairs.append((image, header))
        else:
            file, annotation = (f"{width}x{height}" for height, width in (header.size, image.size))
            sizes = f"{image.path} has {file} pixels, its annotation says {annotation}"
            account.add("images of another size than annotated left out", sizes)
    return pairs


def _header(path: Path) -> Header | OSError | None:
    """None without a file."""
    try:
        return read_header(path) if isfile(path) else None
    except OSError as error:
        return error


def _reading(size: tuple[int, int] | None, header: Header) -> Literal["stored", "turned"] | None:
    """None where the size does not tell."""
    turned = _turned_size(header)
    if size is None or turned == header.size:
        return None
    return "turned" if size == turned else "stored"


def _turned_size(header: Header) -> tuple[int, int]:
    height, width = header.size
    return (width, height) if header.orientation >= TRANSPOSED else (height, width)


def _turned(edges: Sequence[float], header: Header) -> tuple[float, ...]:
    """left, top, right, bottom among the pixels as stored -> among those as turned"""
    left, top, right, bottom = edges
    if header.orientation >= TRANSPOSED:
        left, top, right, bottom = top, left, bottom, right
    height, width = _turned_size(header)
    if header.orientation in MIRRORED_COLUMNS:
        left, right = width - right, width - left
    if header.orientation in MIRRORED_ROWS:
        top, bottom = height - bottom, height - top
    return left, top, right, bottom
