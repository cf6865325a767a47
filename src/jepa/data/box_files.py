"""Annotation files of pictures with boxes: Pascal VOC and COCO, with an account of what they hold that is not used."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from jepa.config.files import as_mapping, parse_json, read_bytes
from jepa.config.paths import existing
from jepa.data.decode import SUFFIXES
from jepa.data.folders import has_suffix

EDGES = ("xmin", "ymin", "xmax", "ymax")
MAX_XML = 1 << 24
"""Largest size of the annotation of one image, in bytes."""
MAX_JSON = 1 << 32
"""Largest size of a file of COCO, in bytes; that of 118,000 images has 0.4 GiB."""
MAX_SIDE = 1 << 24
"""Largest side of an image, in pixels: from here on float32 does not hold every whole number."""
UNSET = (None, False, 0, "", "0", "false", "False")
"""Values of a flag that is not set."""


class Account:
    """What is not used as it stands in the files: the number of entries by reason, and the first of each."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}

    def add(self, reason: str, entry: object) -> None:
        self.counts[reason] += 1
        self.first.setdefault(reason, printable(entry))

    def __bool__(self) -> bool:
        return bool(self.counts)

    def __str__(self) -> str:
        return "; ".join(f"{n:,} {reason} (the first: {self.first[reason]})" for reason, n in self.counts.items())


class Box(NamedTuple):
    edges: tuple[float, ...]
    """left, top, right, bottom in pixels from the upper left corner of the image"""
    name: str


class Annotated(NamedTuple):
    """An image and its boxes."""

    path: Path
    entry: str
    """the file with the annotation, or the image's name in it; for messages"""
    size: tuple[int, int] | None
    """height and width, if the annotation has them"""
    boxes: Sequence[Box]


class Annotations(NamedTuple):
    """One part of a data set."""

    source: str
    images: Sequence[Annotated]
    classes: tuple[str, ...]
    account: Account


def read_voc(root: Path, split: str | None, *, difficult: bool) -> Annotations:
    """The images of ROOT/ImageSets/Main/SPLIT.txt, or without a split all that have annotations.

    Edges are taken as they stand in the file. Objects marked as difficult are left out unless `difficult`.
    """
    folder = existing(root / "Annotations", "dataset.root_path")
    pictures = existing(root / "JPEGImages", "dataset.root_path")
    paths = {Path(entry.name).stem: entry.path for entry in os.scandir(pictures) if has_suffix(entry.name, SUFFIXES)}
    images, account = [], Account()
    for name in sorted(path.stem for path in folder.glob("*.xml")) if split is None else _names_in_split(root, split):
        source = folder / f"{name}.xml"
        if not source.is_file():
            raise ValueError(f"dataset: {name} is in the split {split}, but there is no {source}")
        if name in paths:
            images.append(_read_voc_file(source, Path(paths[name]), difficult, account))
        else:
            account.add("images without a file left out", f"{pictures / name} with one of {' '.join(SUFFIXES)}")
    names = {box.name for image in images for box in image.boxes}
    return Annotations(f"{root}, {split or 'all images'}", images, tuple(sorted(names)), account)


def _names_in_split(root: Path, split: str) -> list[str]:
    """The first column; the lists of a single class have a second one."""
    path = existing(root / "ImageSets" / "Main" / f"{split}.txt", f"dataset: no split {split}")
    lines = path.read_text(encoding="utf-8-sig", errors="backslashreplace").splitlines()
    return list(dict.fromkeys(line.split()[0] for line in lines if line.strip()))


def _read_voc_file(source: Path, path: Path, difficult: bool, account: Account) -> Annotated:
    root = _read_xml(source)
    boxes = []
    for node in root.iter("object"):
        if not difficult and _text(node.findtext("difficult")) not in UNSET:
            continue
        edges = tuple(_number(node.findtext(f"bndbox/{edge}")) for edge in EDGES)
        name = _text(node.findtext("name"))
        if not name:
            account.add("objects without a name left out", source)
        elif not all(map(math.isfinite, edges)):
            account.add(f"objects without numbers as {', '.join(EDGES)} in bndbox left out", source)
        else:
            boxes.append(Box(edges, name))
    return Annotated(path, str(source), _size(*(root.findtext(f"size/{side}") for side in ("height", "width"))), boxes)


def _read_xml(source: Path) -> ElementTree.Element:
    """Raises ValueError or FileError; entities, which may stand for other files or gigabytes, are refused unread."""
    data = read_bytes(source, MAX_XML)
    if b"<!DOCTYPE" in data.replace(b"\0", b""):  # also in UTF-16
        raise ValueError(f"{source}: has a document type (<!DOCTYPE), which annotations do not need; remove it")
    try:
        return ElementTree.fromstring(data)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise ValueError(f"{source}: is not readable as XML: {error}") from error


def read_coco(source: Path, pictures: Path) -> Annotations:
    """The images of an annotation file, and the names of all its categories in the order of their ids.

    Crowds (`iscrowd`) are left out: their boxes hold several objects.
    """
    content = as_mapping(parse_json(read_bytes(source, MAX_JSON), source, is_checked=False), source, {})
    account = Account()
    names = _category_names(source, content, account)
    images = _images_by_id(source, content, pictures, account)
    for number, entry in enumerate(_entries(source, content, "annotations")):
        if entry.get("iscrowd") not in UNSET:
            continue
        image, name = images.get(_id(entry.get("image_id"))), names.get(_id(entry.get("category_id")))
        edges = _edges(entry.get("bbox"))
        if image is None or name is None:
            kind = "an image" if image is None else "a category"
            account.add(f"annotations of {kind} that is not listed left out", _annotation(entry, number))
        elif edges is None:
            account.add("annotations without four numbers as bbox left out", _annotation(entry, number))
        else:
            image.boxes.append(Box(edges, name))  # pyright: ignore[reportAttributeAccessIssue]
    unique = {id(image): image for image in images.values()}
    return Annotations(str(source), [*unique.values()], tuple(dict.fromkeys(names.values())), account)


def _category_names(source: Path, content: dict, account: Account) -> dict[str | None, str]:
    """The names by id, in the order of the ids."""
    names: dict[str | None, str] = {}
    for number, entry in enumerate(_entries(source, content, "categories")):
        key, name = _id(entry.get("id")), _text(entry.get("name"))
        if key is None or not name:
            raise ValueError(f"{source}: entry {number} of categories has no {'name' if key else 'id'}")
        if names.setdefault(key, name) != name:
            raise ValueError(f"{source}: the category id {key} stands for {names[key]} and {name}")
    for name, count in Counter(names.values()).items():
        if count > 1:
            account.add("categories of several ids taken as one class", name)
    return {key: names[key] for key in sorted(names, key=_order)}


def _images_by_id(source: Path, content: dict, pictures: Path, account: Account) -> dict[str | None, Annotated]:
    """Entries with one file name share an image."""
    by_id: dict[str | None, Annotated] = {}
    by_name: dict[str, Annotated] = {}
    for number, entry in enumerate(_entries(source, content, "images")):
        key, name = _id(entry.get("id")), _text(entry.get("file_name"))
        if key is None or not name:
            account.add("images without id or file_name left out", f"entry {number} of images")
            continue
        if name in by_name:
            account.add("images listed again, taken as one", name)
        else:
            by_name[name] = Annotated(pictures / name, name, _size(entry.get("height"), entry.get("width")), [])
        if by_id.setdefault(key, by_name[name]) is not by_name[name]:
            raise ValueError(f"{source}: the image id {key} stands for {by_id[key].entry} and {printable(name)}")
    return by_id


def _entries(source: Path, content: dict, section: str) -> list[dict]:
    """The mappings of a section, empty for other values; a file without boxes may have no annotations."""
    entries = content.get(section)
    if entries is None and section == "annotations":
        return []
    if not isinstance(entries, list):
        raise ValueError(f"{source}: has no list of {section}")
    return [entry if isinstance(entry, dict) else {} for entry in entries]


def _annotation(entry: dict, number: int) -> str:
    key = _id(entry.get("id"))
    return f"entry {number} of annotations" if key is None else f"annotation {key}"


def _edges(bbox: object) -> tuple[float, ...] | None:
    """left, top, right, bottom from the bbox (left, top, width, height); None unless it holds four finite numbers"""
    if not isinstance(bbox, list) or len(bbox) != 4:
        return None
    left, top, width, height = map(_number, bbox)
    edges = left, top, left + width, top + height
    return edges if all(map(math.isfinite, edges)) else None


def _size(height: object, width: object) -> tuple[int, int] | None:
    """None unless both are whole numbers from 1 on."""
    sides = _number(height), _number(width)
    return (int(sides[0]), int(sides[1])) if all(s.is_integer() and 1 <= s < MAX_SIDE for s in sides) else None


def _number(value: object) -> float:
    """Numbers and texts of numbers; nan for anything else."""
    try:
        return float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        return math.nan


def _id(value: object) -> str | None:
    """Ids as text, since files mix 3, 3.0 and "3"; None for what is no id."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value) if isinstance(value, int | str) and not isinstance(value, bool) else None


def _order(key: str | None) -> tuple[bool, int, str]:
    """Numbers by value, then other ids in alphabetical order."""
    is_number = re.fullmatch(r"-?[0-9]{1,18}", str(key)) is not None
    return not is_number, int(str(key)) if is_number else 0, str(key)


def _text(value: object) -> str:
    """Text and numbers as text without surrounding space; "" for anything else."""
    return printable(value).strip() if isinstance(value, int | float | str) and not isinstance(value, bool) else ""


def printable(value: object) -> str:
    """Text that can be printed and saved; JSON may hold halves of characters."""
    return str(value).encode(errors="backslashreplace").decode()
