"""Pictures with boxes in them, from folders in the layouts of Pascal VOC and COCO."""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image

from jepa.config.files import read_json
from jepa.config.paths import existing
from jepa.data.decode import SUFFIXES, decode, warn_of_slow_decoding
from jepa.data.folders import HoldingOut, has_suffix
from jepa.data.images import NATURAL
from jepa.types import Channels, Field, Sample

log = logging.getLogger(__name__)
NO_AREA = "without area dropped"
OUTSIDE = "outside of the image dropped"
CLIPPED = "clipped at the image's edge"
FOREIGN = "of classes that are not in dataset.classes dropped"


class _BoxFolder(HoldingOut):
    """Images with the field boxes: float32 [m, 5], left, top, right, bottom in pixels and class of each box.

    Degenerate boxes (no area or swapped corners) and boxes wholly outside of the image are dropped, others are clipped
    at its edges; a warning counts both for each part. The data set has no labels.
    """

    fields = {"boxes": Field(shape=(5,), ragged=True)}
    classes: tuple[str, ...]
    test_part: Self | None = None

    def __init__(self, *, channels: int, keep_empty: bool, is_subset: bool) -> None:
        warn_of_slow_decoding()
        self.channels = channels
        self.mean, self.std = NATURAL[channels]
        self.keep_empty, self.is_subset = keep_empty, is_subset

    def _take(self, images: Sequence[Annotated]) -> None:
        """Store these images; with `is_subset`, boxes of other classes are dropped, else refused."""
        numbers = {name: number for number, name in enumerate(self.classes)}
        problems, first, samples = Counter(), None, []
        for image in images:
            tidy, image_problems = _tidy(image, numbers, self.is_subset)
            problems += image_problems
            first = first or (image.source if image_problems else None)
            if len(tidy) or self.keep_empty:
                samples.append((image, tidy))
        if problems:
            counts = ", ".join(f"{count} {problem}" for problem, count in problems.items())
            log.warning("boxes of %d images: %s; the first is in %s", len(images), counts, first)
        if not samples:
            raise ValueError(f"dataset: none of {len(images)} images{'' if self.keep_empty else ' has boxes'} is left")
        # arrays, since lists would be copied into every worker, page by page
        self.paths = np.array([str(image.image) for image, _ in samples])
        self.sizes = np.array([image.size for image, _ in samples])
        self.ends = np.cumsum([len(tidy) for _, tidy in samples])
        self.rows = np.concatenate([np.array(tidy, dtype=np.float32).reshape(-1, 5) for _, tidy in samples])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        """A picture uint8 [C, 1, H, W] with its boxes; OSError or RuntimeError if unreadable or of another size."""
        with open(self.describe(index), "rb") as file:
            clip = decode(file.read(), channels=self.channels)
        height, width = self.sizes[index].tolist()
        if clip.shape[-2:] != (height, width):
            raise OSError(f"has {clip.shape[-1]}x{clip.shape[-2]} pixels, its annotation says {width}x{height}")
        begin = self.ends[index - 1] if index else 0
        return Sample(clip, -1, {"boxes": torch.from_numpy(self.rows[begin : self.ends[index]].copy())})

    def describe(self, index: int) -> str:
        return str(self.paths[index])

    def test(self) -> Self | None:
        return self.test_part


def _tidy(image: Annotated, numbers: dict[str, int], is_subset: bool) -> tuple[list[tuple[float, ...]], Counter]:
    """Edges and class of the valid boxes, and the number of boxes with each problem."""
    boxes, problems = [], Counter()
    for box in image.boxes:
        if box.name not in numbers and not is_subset:
            raise ValueError(
                f"{image.source}: has the class {box.name}, which the training part has not; name the classes that "
                f"count with dataset.classes=[{','.join([*numbers, box.name])}]"
            )
        edges, problem = _clipped(box, image.size) if box.name in numbers else (None, FOREIGN)
        if problem:
            problems[problem] += 1
        if edges is not None:
            boxes.append((*edges, float(numbers[box.name])))
    return boxes, problems


def _clipped(box: Box, size: tuple[int, int]) -> tuple[tuple[float, ...] | None, str | None]:
    """The box inside of the image and what was wrong with it."""
    left, top, right, bottom = box.edges
    height, width = size
    if not (left < right and top < bottom and all(map(math.isfinite, box.edges))):
        return None, NO_AREA
    if right <= 0 or bottom <= 0 or left >= width or top >= height:
        return None, OUTSIDE
    inside = max(0.0, left), max(0.0, top), min(float(width), right), min(float(height), bottom)
    return inside, None if inside == box.edges else CLIPPED


class VOC(_BoxFolder):
    """Pascal VOC (Everingham et al. 2010): Annotations/NAME.xml, JPEGImages/NAME.jpg, ImageSets/Main/SPLIT.txt.

    `classes` are numbered as given, or all of the training part in alphabetical order. `difficult` keeps the objects
    that are marked so.
    """

    rules = ("jepa.data.rules.voc",)

    def __init__(
        self,
        *,
        root_path: str,
        split: str | None,
        val_split: str | None,
        test_split: str | None = None,
        classes: Sequence[str] | None = None,
        difficult: bool = False,
        keep_empty: bool = True,
        channels: Channels = 3,
    ) -> None:
        super().__init__(channels=channels, keep_empty=keep_empty, is_subset=classes is not None)
        root = Path(root_path).expanduser().absolute()
        images = read_voc(root, split, difficult=difficult)
        self.classes = tuple(classes or sorted({box.name for image in images for box in image.boxes}))
        self._take(images)
        self.held_out, self.test_part = (
            None if name is None else self._apart(read_voc(root, name, difficult=difficult))
            for name in (val_split, test_split)
        )


class COCO(_BoxFolder):
    """COCO (Lin et al. 2014): a JSON of annotations and a folder of images for each part, both in `root_path`.

    `classes` are numbered as given, or all categories of the training part in the order of their ids.
    """

    rules = ("jepa.data.rules.coco",)

    def __init__(
        self,
        *,
        root_path: str,
        annotations: str,
        images: str,
        val_annotations: str | None,
        val_images: str | None = None,
        test_annotations: str | None = None,
        test_images: str | None = None,
        classes: Sequence[str] | None = None,
        keep_empty: bool = True,
        channels: Channels = 3,
    ) -> None:
        super().__init__(channels=channels, keep_empty=keep_empty, is_subset=classes is not None)
        root = Path(root_path).expanduser().absolute()
        samples, names = read_coco(root / annotations, existing(root / images, "dataset.images"))
        self.classes = tuple(classes or names)
        self._take(samples)
        self.held_out, self.test_part = (
            None if file is None else self._apart(read_coco(root / file, root / folder)[0])
            for file, folder in ((val_annotations, val_images or images), (test_annotations, test_images or images))
        )


EDGES = ("xmin", "ymin", "xmax", "ymax")

EXIF_ORIENTATION = 0x0112

FIRST_TURNED = 5
"""the first of the orientations in which height and width change places"""


class Box(NamedTuple):
    edges: tuple[float, float, float, float]
    """left, top, right, bottom in pixels from the upper left corner of the image"""
    name: str


class Annotated(NamedTuple):
    """An image and what is annotated in it."""

    image: Path
    source: Path
    """the file that says so"""
    size: tuple[int, int]
    """height and width"""
    boxes: Sequence[Box]


def read_voc(root: Path, split: str | None, *, difficult: bool) -> list[Annotated]:
    """The images of ROOT/ImageSets/Main/SPLIT.txt, or without a split all that have annotations.

    Edges are taken as they stand in the file. Objects marked as difficult are left out unless `difficult`.
    """
    folder = existing(root / "Annotations", "dataset.root_path")
    pictures = existing(root / "JPEGImages", "dataset.root_path")
    images = {Path(entry.name).stem: entry.path for entry in os.scandir(pictures) if has_suffix(entry.name, SUFFIXES)}
    names = sorted(path.stem for path in folder.glob("*.xml")) if split is None else _listed(root, split)
    found = []
    for name in names:
        source = folder / f"{name}.xml"
        if not source.is_file():
            raise ValueError(f"dataset: {name} is in the split {split}, but there is no {source}")
        if name not in images:
            raise ValueError(f"{source}: there is no image {pictures / name} with one of {' '.join(SUFFIXES)}")
        found.append(_voc_file(source, Path(images[name]), difficult))
    return found


def _listed(root: Path, split: str) -> list[str]:
    """The names in a list; a second column, as in the lists of a class, is not looked at."""
    path = existing(root / "ImageSets" / "Main" / f"{split}.txt", f"dataset: no split {split}")
    return [line.split()[0] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _voc_file(source: Path, image: Path, difficult: bool) -> Annotated:
    try:
        root = ElementTree.parse(source).getroot()
    except ElementTree.ParseError as fault:
        raise ValueError(f"{source}: is not readable as XML: {fault}") from fault
    objects = [o for o in root.iter("object") if difficult or (o.findtext("difficult") or "0").strip() != "1"]
    boxes = [
        Box(tuple(_number(source, o, f"bndbox/{edge}") for edge in EDGES), _text(source, o, "name"))  # pyright: ignore
        for o in objects
    ]
    height, width = (root.findtext(f"size/{side}") or "" for side in ("height", "width"))
    is_told = height.strip().isdecimal() and width.strip().isdecimal() and int(height) and int(width)
    return Annotated(image, source, (int(height), int(width)) if is_told else _size_of(image), boxes)


def _text(source: Path, node: ElementTree.Element, tag: str) -> str:
    text = (node.findtext(tag) or "").strip()
    if not text:
        raise ValueError(f"{source}: an object has no {tag}")
    return text


def _number(source: Path, node: ElementTree.Element, tag: str) -> float:
    text = _text(source, node, tag)
    try:
        return float(text)
    except ValueError as fault:
        raise ValueError(f"{source}: an object has {tag} {text!r}, which is no number") from fault


def _size_of(image: Path) -> tuple[int, int]:
    """From the header of the file, upright as it is decoded."""
    try:
        with Image.open(image) as opened:
            width, height = opened.size
            is_turned = opened.getexif().get(EXIF_ORIENTATION, 1) >= FIRST_TURNED
    except OSError as fault:
        raise ValueError(f"{image}: is not readable as an image: {fault}") from fault
    return (width, height) if is_turned else (height, width)


def read_coco(source: Path, pictures: Path) -> tuple[list[Annotated], tuple[str, ...]]:
    """The images of an annotation file, and the names of all its categories in the order of their ids.

    Crowds (`iscrowd`) are left out: their box is none of a single thing.
    """
    content = read_json(source, max_bytes=None)
    categories = {entry["id"]: str(entry["name"]) for entry in _entries(source, content, "categories", "id name")}
    boxes: dict[Any, list[Box]] = {
        entry["id"]: [] for entry in _entries(source, content, "images", "id file_name height width")
    }
    for entry in _entries(source, content, "annotations", "image_id category_id bbox"):
        if entry["category_id"] not in categories or entry["image_id"] not in boxes:
            raise ValueError(f"{source}: annotation {entry.get('id')} is of a category or an image that is not listed")
        if not entry.get("iscrowd"):
            boxes[entry["image_id"]].append(Box(_edges(source, entry), categories[entry["category_id"]]))
    found = []
    for entry in content["images"]:
        image = pictures / entry["file_name"]
        if not image.is_file():
            raise ValueError(f"{source}: there is no image {image}")
        found.append(Annotated(image, source, (entry["height"], entry["width"]), boxes[entry["id"]]))
    return found, tuple(categories[key] for key in sorted(categories))


def _edges(source: Path, entry: dict) -> tuple[float, float, float, float]:
    """bbox is left, top, width, height"""
    try:
        left, top, width, height = map(float, entry["bbox"])
    except (TypeError, ValueError) as fault:
        raise ValueError(
            f"{source}: annotation {entry.get('id')} has bbox {entry['bbox']}, not four numbers"
        ) from fault
    return left, top, left + width, top + height


def _entries(source: Path, content: dict, section: str, keys: str) -> Iterator[dict]:
    if not isinstance(content.get(section), list):
        raise ValueError(f"{source}: has no list of {section}")
    for entry in content[section]:
        lacking = [key for key in keys.split() if not isinstance(entry, dict) or key not in entry]
        if lacking:
            raise ValueError(f"{source}: an entry of {section} has no {lacking[0]}")
        yield entry
