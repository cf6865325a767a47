"""Labelled images of Hugging Face data sets: from the hub or from local parquet files."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from jepa.config.paths import on_this_machine
from jepa.data.folders import NO_LABEL, VALIDATION_NAMES, FileDataset, class_names, class_numbers
from jepa.types import Channels, Positive

if TYPE_CHECKING:
    import datasets

LABEL_NAMES = ("label", "labels", "fine_label", "class", "target")
"""Default names of the label column, in order of preference."""


class HuggingFaceImages(FileDataset):
    """A data set of the Hugging Face hub, a local parquet file, or a folder of parquet files named after their splits.

    `path` is the name on the hub or the local path; `val=None` takes a split with a default name as the held-out part;
    columns that are None are detected by type and name.
    """

    rules = ("jepa.data.rules.local_or_hub",)

    def __init__(
        self,
        *,
        path: str,
        subset: str | None = None,
        train: str = "train",
        val: str | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
        channels: Channels = 3,
        max_value: Positive | None = None,
    ) -> None:
        super().__init__(channels, max_value=max_value)
        splits = _find_splits(path, subset, names=(train, *filter(None, [val]), *VALIDATION_NAMES))
        for key, split in (("train", train), ("val", val)):
            if split is not None and split not in splits:
                raise ValueError(f"dataset.{key}={split}: {path} has no such split, but {', '.join(splits)}")
        val = val or next((name for name in VALIDATION_NAMES if name in splits and name != train), None)
        self.path = path
        rows = splits[train]()
        self.image_column = _image_column(rows, image_column)
        self.label_column = _label_column(rows, label_column)
        self.classes = _class_names(rows, self.label_column)
        self._load(train, rows)
        self.held_out = None if val is None else self._part(val, splits[val]())
        self.warn_of_dark_images()

    def _load(self, split: str, rows: datasets.Dataset) -> None:
        self.split, self.rows = split, rows
        self.labels = _labels(rows, self.label_column, self.classes)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """uint8 [C, 1, H, W] and its label; raises OSError or RuntimeError if it cannot be read."""
        return self.decode(self.read(index)), int(self.labels[index])

    def read(self, index: int) -> bytes:
        # the arrow table itself: ten times faster than a row of `datasets`, and without its decoding
        return _encoded(self.rows.data.column(self.image_column)[index].as_py())

    def describe(self, index: int) -> str:
        image = self.rows.data.column(self.image_column)[index].as_py()
        name = image.get("path") if isinstance(image, dict) else None
        return f"{self.path} split {self.split} row {index}" + (f" ({name})" if name else "")


def _find_splits(path: str, subset: str | None, names: Sequence[str]) -> dict[str, Callable[[], datasets.Dataset]]:
    """Functions that open the splits, by name of the split; a local path never uses the network."""
    try:
        import datasets
    except ImportError as error:
        raise ValueError("dataset=hf needs the package datasets: pip install 'jepa-train[hf]'") from error
    try:
        local = on_this_machine(path)
    except ValueError as error:
        raise ValueError(f"dataset.path={path}: {error}") from error
    if local is not None:
        files = _parquet_files(local, names)
        return {s: partial(datasets.load_dataset, "parquet", data_files={s: f}, split=s) for s, f in files.items()}
    try:
        splits = datasets.get_dataset_split_names(path, config_name=subset)
    except (OSError, ValueError) as error:
        message = f"dataset.path={path}: is not on this machine, and the hub has no such data set: {error}"
        raise ValueError(message) from error
    return {split: partial(datasets.load_dataset, path, name=subset, split=split) for split in map(str, splits)}


def _parquet_files(path: Path, names: Sequence[str]) -> dict[str, list[str]]:
    """Files of each split, by the first word of the name of the file or its folder; others are of the first split."""
    files = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    if not files:
        raise ValueError(f"dataset.path={path}: no .parquet file in it")
    splits: dict[str, list[str]] = {}
    for file in files:
        words = [re.split(r"[-_.]", name)[0] for name in (file.name, file.parent.name)]
        split = next((word for word in words if word in names and path.is_dir()), names[0])
        splits.setdefault(split, []).append(str(file))
    return splits


def _image_column(rows: datasets.Dataset, column: str | None) -> str:
    if column is not None:
        return _existing_column(rows, column, "dataset.image_column")
    images = [name for name, feature in rows.features.items() if _holds_images(feature)]
    if not images:
        raise ValueError(f"no column of images found; name one with dataset.image_column: {_columns(rows)}")
    return images[0]


def _holds_images(feature: Any) -> bool:
    if isinstance(feature, dict):
        return "bytes" in feature
    return type(feature).__name__ == "Image" or getattr(feature, "dtype", "") == "binary"


def _label_column(rows: datasets.Dataset, column: str | None) -> str | None:
    if column is not None:
        return _existing_column(rows, column, "dataset.label_column")
    categories = [name for name, feature in rows.features.items() if type(feature).__name__ == "ClassLabel"]
    return next((name for name in LABEL_NAMES if name in rows.features), next(iter(categories), None))


def _existing_column(rows: datasets.Dataset, column: str, key: str) -> str:
    if column not in rows.features:
        raise ValueError(f"{key}={column}: no such column; {_columns(rows)}")
    return column


def _columns(rows: datasets.Dataset) -> str:
    return "the columns are " + ", ".join(f"{name} ({type(f).__name__})" for name, f in rows.features.items())


def _class_names(rows: datasets.Dataset, column: str | None) -> tuple[str, ...]:
    """From the feature's names, from the column `<label>_name`, or from the labels themselves."""
    if column is None:
        return ()
    if names := getattr(rows.features[column], "names", None):
        return tuple(names)
    kind = str(getattr(rows.features[column], "dtype", "list"))
    if not re.match("string|large_string|u?int|bool", kind):
        raise ValueError(f"dataset.label_column={column}: expected integers or strings, found {kind}")
    if "string" in kind:
        return tuple(sorted(set(_texts(rows, column)) - NO_LABEL))
    pairs: dict[str, str] = {}
    if f"{column}_name" in rows.features:
        pairs = dict(zip(_texts(rows, column), _texts(rows, f"{column}_name"), strict=True))
    return tuple(pairs.get(number) or number for number in class_names(_texts(rows, column)))


def _labels(rows: datasets.Dataset, column: str | None, classes: Sequence[str]) -> np.ndarray:
    """Class numbers, long [n], -1 for a missing label."""
    if column is None:
        return np.full(len(rows), -1)
    are_names = "string" in str(rows.features[column].dtype)
    expected = classes if are_names else [str(number) for number in range(len(classes))]
    return class_numbers(_texts(rows, column), expected, f"column {column}")


def _texts(rows: datasets.Dataset, column: str) -> list[str]:
    values = rows.data.column(column).to_pylist()
    return ["" if value is None else value if isinstance(value, str) else str(int(value)) for value in values]


def _encoded(image: Any) -> bytes:
    """The bytes of {bytes, path} or of bytes."""
    data = image.get("bytes") or Path(image["path"]).read_bytes() if isinstance(image, dict) else image
    if not isinstance(data, bytes):
        raise OSError(f"no encoded image but {type(data).__name__}")
    return data
