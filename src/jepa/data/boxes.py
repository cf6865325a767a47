"""Pictures with boxes, from folders in the layouts of Pascal VOC and COCO."""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import ExifTags, Image

from jepa.config.paths import existing, read_json
from jepa.data.decode import SUFFIXES, decode
from jepa.data.folders import FileDataset, has_suffix
from jepa.types import Channels, Field, Sample

log = logging.getLogger(__name__)
NO_AREA = "without area dropped"
OUTSIDE = "outside of the image dropped"
CLIPPED = "clipped at the image's edge"
OTHER_CLASS = "of classes that are not in dataset.classes dropped"
EDGES = ("xmin", "ymin", "xmax", "ymax")
MIN_TRANSPOSED = 5
"""Smallest EXIF orientation that exchanges height and width."""


class _BoxFolder(FileDataset):
    """Images with the field boxes: float32 [m, 5], left, top, right, bottom in pixels and class of each box.

    Degenerate boxes (no area or swapped corners) and boxes wholly outside of the image are dropped, others are clipped
    at its edges; a warning counts both for each part. The data set has no labels.
    """

    fields = {"boxes": Field(shape=(5,), ragged=True)}
    classes: tuple[str, ...]
    test_part: Self | None = None

    def __init__(self, *, channels: int, keep_empty: bool, is_subset: bool) -> None:
        super().__init__(channels)
        self.keep_empty, self.is_subset = keep_empty, is_subset

    def _load(self, images: Sequence[Annotated]) -> None:
        """Store these images; boxes of unknown classes are dropped with `is_subset`, else refused."""
        numbers = {name: number for number, name in enumerate(self.classes)}
        problems, first, samples = Counter(), None, []
        for image in images:
            boxes, image_problems = _valid_boxes(image, numbers, self.is_subset)
            problems += image_problems
            first = first or (image.source if image_problems else None)
            if boxes or self.keep_empty:
                samples.append((image, boxes))
        if problems:
            counts = ", ".join(f"{count} {problem}" for problem, count in problems.items())
            log.warning("boxes of %d images: %s; the first is in %s", len(images), counts, first)
        if not samples:
            raise ValueError(f"dataset: none of {len(images)} images{'' if self.keep_empty else ' has boxes'} is left")
        # arrays, since lists would be copied into every worker, page by page
        self.paths = np.array([str(image.path) for image, _ in samples])
        self.sizes = np.array([image.size for image, _ in samples])
        self.ends = np.cumsum([len(boxes) for _, boxes in samples])
        self.rows = np.array([box for _, boxes in samples for box in boxes], dtype=np.float32).reshape(-1, 5)

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

    def encoded(self, index: int) -> bytes:
        """Size and first bytes of the picture, and its boxes."""
        begin = self.ends[index - 1] if index else 0
        return super().encoded(index) + self.rows[begin : self.ends[index]].tobytes()

    def test(self) -> Self | None:
        return self.test_part


def _valid_boxes(image: Annotated, numbers: dict[str, int], is_subset: bool) -> tuple[list[tuple[float, ...]], Counter]:
    """Edges and class of each valid box, and the number of boxes with each problem."""
    boxes, problems = [], Counter()
    for box in image.boxes:
        if box.name not in numbers and not is_subset:
            raise ValueError(
                f"{image.source}: has the class {box.name}, which the training part has not; list the classes to use "
                f"with dataset.classes=[{','.join([*numbers, box.name])}]"
            )
        edges, problem = _clipped(box, image.size) if box.name in numbers else (None, OTHER_CLASS)
        if problem:
            problems[problem] += 1
        if edges is not None:
            boxes.append((*edges, float(numbers[box.name])))
    return boxes, problems


def _clipped(box: Box, size: tuple[int, int]) -> tuple[tuple[float, ...] | None, str | None]:
    """The part of the box inside of the image, and its problem."""
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

    `classes` are numbered in the given order; by default they are all classes of the training part in alphabetical
    order. `difficult=True` keeps the objects marked as difficult.
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
        self._load(images)
        self.held_out, self.test_part = (
            None if name is None else self._part(read_voc(root, name, difficult=difficult))
            for name in (val_split, test_split)
        )


class COCO(_BoxFolder):
    """COCO (Lin et al. 2014): a JSON of annotations and a folder of images for each part, both in `root_path`.

    `classes` are numbered in the given order; by default they are all categories in the order of their ids.
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
        self._load(samples)
        self.held_out, self.test_part = (
            None if file is None else self._part(read_coco(root / file, root / folder)[0])
            for file, folder in ((val_annotations, val_images or images), (test_annotations, test_images or images))
        )


class Box(NamedTuple):
    edges: tuple[float, ...]
    """left, top, right, bottom in pixels from the upper left corner of the image"""
    name: str


class Annotated(NamedTuple):
    """An image and its boxes."""

    path: Path
    source: Path
    """file with the annotation"""
    size: tuple[int, int]
    """height and width"""
    boxes: Sequence[Box]


def read_voc(root: Path, split: str | None, *, difficult: bool) -> list[Annotated]:
    """The images of ROOT/ImageSets/Main/SPLIT.txt, or without a split all that have annotations.

    Edges are taken as they stand in the file. Objects marked as difficult are left out unless `difficult`.
    """
    folder = existing(root / "Annotations", "dataset.root_path")
    pictures = existing(root / "JPEGImages", "dataset.root_path")
    paths = {Path(entry.name).stem: entry.path for entry in os.scandir(pictures) if has_suffix(entry.name, SUFFIXES)}
    images = []
    for name in sorted(path.stem for path in folder.glob("*.xml")) if split is None else _names_in_split(root, split):
        source = folder / f"{name}.xml"
        if not source.is_file():
            raise ValueError(f"dataset: {name} is in the split {split}, but there is no {source}")
        if name not in paths:
            raise ValueError(f"{source}: there is no image {pictures / name} with one of {' '.join(SUFFIXES)}")
        images.append(_read_voc_file(source, Path(paths[name]), difficult))
    return images


def _names_in_split(root: Path, split: str) -> list[str]:
    """The first column; the lists of a single class have a second one."""
    path = existing(root / "ImageSets" / "Main" / f"{split}.txt", f"dataset: no split {split}")
    return [line.split()[0] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _read_voc_file(source: Path, path: Path, difficult: bool) -> Annotated:
    try:
        root = ElementTree.parse(source).getroot()
    except ElementTree.ParseError as error:
        raise ValueError(f"{source}: is not readable as XML: {error}") from error
    objects = [o for o in root.iter("object") if difficult or (o.findtext("difficult") or "0").strip() != "1"]
    boxes = [
        Box(tuple(_value(source, o, f"bndbox/{edge}", float) for edge in EDGES), _value(source, o, "name", str))
        for o in objects
    ]
    size = [(root.findtext(f"size/{side}") or "").strip() for side in ("height", "width")]
    has_size = all(text.isdecimal() and int(text) for text in size)
    return Annotated(path, source, (int(size[0]), int(size[1])) if has_size else _image_size(path), boxes)


def _value(source: Path, node: ElementTree.Element, tag: str, convert: Callable[[str], Any]) -> Any:
    text = (node.findtext(tag) or "").strip()
    if not text:
        raise ValueError(f"{source}: an object has no {tag}")
    try:
        return convert(text)
    except ValueError as error:
        raise ValueError(f"{source}: an object has {tag} {text!r}, which is no number") from error


def _image_size(path: Path) -> tuple[int, int]:
    """Height and width of the upright image, from the header of the file."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            is_transposed = image.getexif().get(ExifTags.Base.Orientation, 1) >= MIN_TRANSPOSED
    except OSError as error:
        raise ValueError(f"{path}: is not readable as an image: {error}") from error
    return (width, height) if is_transposed else (height, width)


def read_coco(source: Path, pictures: Path) -> tuple[list[Annotated], tuple[str, ...]]:
    """The images of an annotation file, and the names of all its categories in the order of their ids.

    Crowds (`iscrowd`) are left out: their boxes hold several objects.
    """
    content = read_json(source)
    categories = {entry["id"]: str(entry["name"]) for entry in _entries(source, content, "categories", "id name")}
    entries = list(_entries(source, content, "images", "id file_name height width"))
    boxes: dict[Any, list[Box]] = {entry["id"]: [] for entry in entries}
    for entry in _entries(source, content, "annotations", "image_id category_id bbox"):
        if entry["category_id"] not in categories or entry["image_id"] not in boxes:
            raise ValueError(f"{source}: annotation {entry.get('id')} is of a category or an image that is not listed")
        if not entry.get("iscrowd"):
            boxes[entry["image_id"]].append(Box(_edges(source, entry), categories[entry["category_id"]]))
    images = []
    for entry in entries:
        path = pictures / entry["file_name"]
        if not path.is_file():
            raise ValueError(f"{source}: there is no image {path}")
        images.append(Annotated(path, source, (entry["height"], entry["width"]), boxes[entry["id"]]))
    return images, tuple(categories[key] for key in sorted(categories))


def _edges(source: Path, entry: dict) -> tuple[float, ...]:
    """left, top, right, bottom from the bbox (left, top, width, height)"""
    try:
        left, top, width, height = map(float, entry["bbox"])
    except (TypeError, ValueError) as error:
        name = f"{source}: annotation {entry.get('id')}"
        raise ValueError(f"{name} has bbox {entry['bbox']}, not four numbers") from error
    return left, top, left + width, top + height


def _entries(source: Path, content: dict, section: str, keys: str) -> Iterator[dict]:
    if not isinstance(content.get(section), list):
        raise ValueError(f"{source}: has no list of {section}")
    for entry in content[section]:
        missing = [key for key in keys.split() if not isinstance(entry, dict) or key not in entry]
        if missing:
            raise ValueError(f"{source}: an entry of {section} has no {missing[0]}")
        yield entry
