"""Pictures with boxes in them, from folders in the layouts of Pascal VOC and COCO."""

from __future__ import annotations

import copy
import logging
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from jepa.data.box_files import Annotated, Box, read_coco, read_voc
from jepa.data.decode import check_reading, decode
from jepa.data.folders import existing_folder
from jepa.data.images import NATURAL

log = logging.getLogger(__name__)

NO_AREA = "without area dropped"
OUTSIDE = "outside of the image dropped"
CLIPPED = "clipped at the image's edge"
FOREIGN = "of classes that are not in dataset.classes dropped"


class _BoxFolder:
    """A types.BoxDataset over the images that a kind of annotations tells of.

    Boxes without area, also with swapped corners, and boxes wholly outside of the image are dropped, others are clipped
    at its edges; a warning counts both for each part. Read as any data set of images it has no labels.
    """

    classes: tuple[str, ...]

    def __init__(self, *, channels: int, keep_empty: bool) -> None:
        check_reading(channels)
        self.channels = channels
        self.mean, self.std = NATURAL[channels]
        self.keep_empty = keep_empty
        self.held_out: _BoxFolder | None = None
        self.last: _BoxFolder | None = None

    def _take(self, images: Sequence[Annotated], *, is_subset: bool) -> Self:
        """Hold these images; with `is_subset` of the classes, boxes of other classes are dropped, else refused."""
        numbers = {name: number for number, name in enumerate(self.classes)}
        faults, first, kept = Counter(), None, []
        for image in images:
            tidy, found = _tidy(image, numbers, is_subset)
            faults += found
            first = first or (image.source if found else None)
            if len(tidy) or self.keep_empty:
                kept.append((image, tidy))
        if faults:
            told = ", ".join(f"{count} {fault}" for fault, count in faults.items())
            log.warning("boxes of %d images: %s; the first is in %s", len(images), told, first)
        if not kept:
            raise ValueError(f"dataset: none of {len(images)} images{'' if self.keep_empty else ' has boxes'} is left")
        # arrays, since lists would be copied into every worker, page by page
        self.paths = np.array([str(image.image) for image, _ in kept])
        self.sizes = np.array([image.size for image, _ in kept])
        self.ends = np.cumsum([len(tidy) for _, tidy in kept])
        self.rows = np.concatenate([np.array(tidy, dtype=np.float32).reshape(-1, 5) for _, tidy in kept])
        return self

    def _part(self, images: Sequence[Annotated], *, is_subset: bool) -> Self:
        return copy.copy(self)._take(images, is_subset=is_subset)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """uint8 [C, 1, H, W] and -1; OSError or RuntimeError when it can't be read or has another size than told."""
        with open(self.describe(index), "rb") as file:
            clip = decode(file.read(), channels=self.channels)
        height, width = self.sizes[index].tolist()
        if clip.shape[-2:] != (height, width):
            raise OSError(f"has {clip.shape[-1]}x{clip.shape[-2]} pixels, its annotation says {width}x{height}")
        return clip, -1

    def boxes(self, index: int) -> Tensor:
        """float32 [m, 5]: left, top, right, bottom, class"""
        begin = self.ends[index - 1] if index else 0
        return torch.from_numpy(self.rows[begin : self.ends[index]].copy())

    def describe(self, index: int) -> str:
        return str(self.paths[index])

    def validation(self) -> _BoxFolder | None:
        return self.held_out

    def test(self) -> _BoxFolder | None:
        return self.last


def _tidy(image: Annotated, numbers: dict[str, int], is_subset: bool) -> tuple[list[tuple[float, ...]], Counter]:
    """Edges and class of the boxes that stay, and how many have which fault."""
    kept, faults = [], Counter()
    for box in image.boxes:
        if box.name not in numbers and not is_subset:
            raise ValueError(
                f"{image.source}: has the class {box.name}, which the training part has not; name the classes that "
                f"count with dataset.classes=[{','.join([*numbers, box.name])}]"
            )
        edges, fault = _clipped(box, image.size) if box.name in numbers else (None, FOREIGN)
        if fault:
            faults[fault] += 1
        if edges is not None:
            kept.append((*edges, float(numbers[box.name])))
    return kept, faults


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
        channels: int = 3,
    ) -> None:
        super().__init__(channels=channels, keep_empty=keep_empty)
        root, is_subset = Path(root_path).expanduser().absolute(), classes is not None
        images = read_voc(root, split, difficult=difficult)
        self.classes = tuple(classes or sorted({box.name for image in images for box in image.boxes}))
        self._take(images, is_subset=is_subset)
        self.held_out, self.last = (
            None if name is None else self._part(read_voc(root, name, difficult=difficult), is_subset=is_subset)
            for name in (val_split, test_split)
        )


class COCO(_BoxFolder):
    """COCO (Lin et al. 2014): a JSON of annotations and a folder of images for each part, both in `root_path`.

    `classes` are numbered as given, or all categories of the training part in the order of their ids.
    """

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
        channels: int = 3,
    ) -> None:
        super().__init__(channels=channels, keep_empty=keep_empty)
        root, is_subset = Path(root_path).expanduser().absolute(), classes is not None
        found, names = read_coco(root / annotations, existing_folder(root / images, "dataset.images"))
        self.classes = tuple(classes or names)
        self._take(found, is_subset=is_subset)
        self.held_out, self.last = (
            None if file is None else self._part(read_coco(root / file, root / folder)[0], is_subset=is_subset)
            for file, folder in ((val_annotations, val_images or images), (test_annotations, test_images or images))
        )
