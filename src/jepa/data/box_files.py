"""Annotations of boxes as they lie in files: Pascal VOC's XML, one for each image, and COCO's JSON, one for all.

Whatever cannot be understood raises ValueError with the file's name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from PIL import Image

from jepa.data.decode import SUFFIXES
from jepa.data.folders import content, existing_folder, has_suffix

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
    folder = existing_folder(root / "Annotations", "dataset.root_path")
    pictures = existing_folder(root / "JPEGImages", "dataset.root_path")
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
    path = root / "ImageSets" / "Main" / f"{split}.txt"
    if not path.is_file():
        lists = existing_folder(path.parent, "dataset.root_path")
        raise ValueError(f"dataset: no split {split}, there is no {path}; {content(lists)}")
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
    content = _json(source)
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


def _json(source: Path) -> dict:
    try:
        content = json.loads(source.read_bytes())
    except OSError as fault:
        raise ValueError(f"{source}: cannot be read: {fault.strerror}") from fault
    except ValueError as fault:
        raise ValueError(f"{source}: is not readable as JSON: {fault}") from fault
    if not isinstance(content, dict):
        raise ValueError(f"{source}: holds no object with images, annotations and categories")
    return content


def _entries(source: Path, content: dict, section: str, keys: str) -> Iterator[dict]:
    if not isinstance(content.get(section), list):
        raise ValueError(f"{source}: has no list of {section}")
    for entry in content[section]:
        lacking = [key for key in keys.split() if not isinstance(entry, dict) or key not in entry]
        if lacking:
            raise ValueError(f"{source}: an entry of {section} has no {lacking[0]}")
        yield entry
