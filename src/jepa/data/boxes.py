"""Pictures with boxes, from folders in the layouts of Pascal VOC and COCO."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

import numpy as np
import torch

from jepa.config.paths import existing
from jepa.data.box_exif import ExifReading, Upright, upright
from jepa.data.box_files import Account, Annotations, Box, read_coco, read_voc
from jepa.data.folders import FileDataset
from jepa.types import Channels, Field, Positive, Sample

log = logging.getLogger(__name__)
NO_AREA = "boxes without area left out"
OUTSIDE = "boxes outside of the image left out"
CLIPPED = "boxes clipped at the image's edge"
OTHER_CLASS = "boxes of classes that are not in dataset.classes left out"


class _BoxFolder(FileDataset):
    """Images with the field boxes: float32 [m, 5], left, top, right, bottom in pixels and class of each box.

    Degenerate boxes (no area or swapped corners) and boxes wholly outside of the image are left out, others are clipped
    at its edges. `exif` says whether boxes count the pixels of an image as stored or as turned by its EXIF tag; by
    default the annotated sizes decide. A warning for each part counts all that is not used as it stands. The data set
    has no labels, and without a box in its training part no field either.
    """

    fields = {"boxes": Field(shape=(5,), ragged=True)}
    classes: tuple[str, ...]
    test_part: Self | None = None

    def __init__(
        self, *, channels: int, max_value: float | None, keep_empty: bool, exif: ExifReading, is_subset: bool
    ) -> None:
        super().__init__(channels, max_value=max_value)
        self.keep_empty, self.is_subset = keep_empty, is_subset
        self.exif: ExifReading = exif

    def _load_parts(self, train: Annotations, held_out: Annotations | None, test: Annotations | None) -> None:
        self._load(train)
        if not len(self.rows):
            self.fields = {}
        self.held_out, self.test_part = (None if part is None else self._part(part) for part in (held_out, test))
        self.warn_of_dark_images()

    def _load(self, part: Annotations) -> None:
        """Store these images; boxes of unknown classes are left out with `is_subset`, else refused."""
        numbers = {name: number for number, name in enumerate(self.classes)}
        account = part.account
        images = upright(part.images, self.exif, account)
        pairs = [(one, _valid_boxes(one, numbers, self.is_subset, account)) for one in images]
        samples = [(one, boxes) for one, boxes in pairs if boxes or self.keep_empty]
        if not samples:
            kind = "is left" if self.keep_empty else "with boxes is left (dataset.keep_empty=false)"
            raise ValueError(f"dataset: {part.source}: no image {kind}{account and f'; {account}'}")
        # arrays, since lists would be copied into every worker, page by page
        self.paths = np.array([str(one.image.path) for one, _ in samples])
        self.sizes = np.array([one.size for one, _ in samples])
        self.ends = np.cumsum([len(boxes) for _, boxes in samples])
        self.rows = np.array([box for _, boxes in samples for box in boxes], dtype=np.float32).reshape(-1, 5)
        summary = f"{part.source}: {len(samples):,} images, {len(self.rows):,} boxes of {len(self.classes)} classes"
        if account:
            log.warning("%s; %s", summary, account)
        else:
            log.info("%s", summary)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        """A picture uint8 [C, 1, H, W] with its boxes; OSError or RuntimeError if unreadable or of another size."""
        clip = self.decode(self.read(index))
        height, width = self.sizes[index].tolist()
        if clip.shape[-2:] != (height, width):
            raise OSError(f"has {clip.shape[-1]}x{clip.shape[-2]} pixels, before it had {width}x{height}")
        return Sample(clip, -1, {"boxes": torch.from_numpy(self._boxes(index).copy())})

    def describe(self, index: int) -> str:
        return str(self.paths[index])

    def encoded(self, index: int) -> bytes:
        """Size and first bytes of the picture, and its boxes."""
        return super().encoded(index) + self._boxes(index).tobytes()

    def outline(self, index: int) -> tuple[int, bytes]:
        """Size of the picture, and its boxes."""
        return super().outline(index), self._boxes(index).tobytes()

    def _boxes(self, index: int) -> np.ndarray:
        return self.rows[self.ends[index - 1] if index else 0 : self.ends[index]]

    def test(self) -> Self | None:
        return self.test_part


def _valid_boxes(
    annotated: Upright, numbers: dict[str, int], is_subset: bool, account: Account
) -> list[tuple[float, ...]]:
    """Edges and class of each valid box, clipped to the image."""
    (image, size), boxes = annotated, []
    for box in image.boxes:
        if box.name not in numbers and not is_subset:
            raise ValueError(
                f"{image.entry}: has the class {box.name}, which the training part has not; list the classes to use "
                f"with dataset.classes=[{','.join([*numbers, box.name])}]"
            )
        edges, problem = _clipped(box, size) if box.name in numbers else (None, OTHER_CLASS)
        if problem:
            account.add(problem, image.entry)
        if edges is not None:
            boxes.append((*edges, float(numbers[box.name])))
    return boxes


def _clipped(box: Box, size: tuple[int, int]) -> tuple[tuple[float, ...] | None, str | None]:
    """The part of the box inside of the image, and its problem."""
    left, top, right, bottom = box.edges
    height, width = size
    if not (left < right and top < bottom):
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
        self, *, root_path: str, split: str | None, val_split: str | None, test_split: str | None = None,
        classes: Sequence[str] | None = None, difficult: bool = False, keep_empty: bool = True,
        exif: Literal["auto", "stored", "turned"] = "auto", channels: Channels = 3, max_value: Positive | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            channels=channels, max_value=max_value, keep_empty=keep_empty, exif=exif, is_subset=classes is not None
        )
        root = Path(root_path).expanduser().absolute()
        train = read_voc(root, split, difficult=difficult)
        self.classes = tuple(classes or train.classes)
        self._load_parts(
            train,
            read_voc(root, val_split, difficult=difficult) if val_split else None,
            read_voc(root, test_split, difficult=difficult) if test_split else None,
        )


class COCO(_BoxFolder):
    """COCO (Lin et al. 2014): a JSON of annotations and a folder of images for each part, both in `root_path`.

    `classes` are numbered in the given order; by default they are all categories in the order of their ids.
    """

    rules = ("jepa.data.rules.coco",)

    def __init__(
        self, *, root_path: str, annotations: str, images: str, val_annotations: str | None,
        val_images: str | None = None, test_annotations: str | None = None, test_images: str | None = None,
        classes: Sequence[str] | None = None, keep_empty: bool = True,
        exif: Literal["auto", "stored", "turned"] = "auto", channels: Channels = 3, max_value: Positive | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            channels=channels, max_value=max_value, keep_empty=keep_empty, exif=exif, is_subset=classes is not None
        )
        root = Path(root_path).expanduser().absolute()
        train = read_coco(root / annotations, existing(root / images, "dataset.images"))
        self.classes = tuple(classes or train.classes)
        self._load_parts(
            train,
            read_coco(root / val_annotations, root / (val_images or images)) if val_annotations else None,
            read_coco(root / test_annotations, root / (test_images or images)) if test_annotations else None,
        )
