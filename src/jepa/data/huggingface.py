"""Labelled images of Hugging Face data sets: from the hub or from local parquet files."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from torch import Tensor

from jepa.config.layouts import VALIDATION_NAMES
from jepa.config.paths import content, on_this_machine
from jepa.data.folders import HEAD, FileDataset, class_names, class_numbers, is_useful_held_out
from jepa.data.parquet import ERRORS, column_names
from jepa.types import Channels, Positive

if TYPE_CHECKING:
    import datasets

log = logging.getLogger(__name__)
LABEL_NAMES = ("label", "labels", "fine_label", "class", "target")
"""Default names of the label column, in order of preference."""


class HuggingFaceImages(FileDataset):
    """A data set of the Hugging Face hub, a local parquet file, or a folder of parquet files named after their splits.

    `path` is the name on the hub or the local path; `val=None` takes a split with a default name as the held-out part;
    columns that are None are detected by type and name.
    """

    requires = ("hf", "datasets")
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
        self.path = path
        rows = splits[train]()
        self.image_column = _image_column(rows, image_column)
        self.label_column, self.classes = _label_column(rows, label_column)
        self._names = _names(rows, self.label_column)
        self._load(train, rows)
        candidates = [name for name in VALIDATION_NAMES if name in splits and name != train]
        self.held_out = self._find_held_out({name: splits[name] for name in ([val] if val else candidates)}, bool(val))
        self.warn_of_dark_images()

    def _find_held_out(self, splits: Mapping[str, Callable[[], datasets.Dataset]], is_named: bool) -> Self | None:
        for name, load in splits.items():
            part = self._part(name, load(), not is_named)
            if is_useful_held_out(part.labels, self.classes, f"split {name}", is_named=is_named):
                log.info("%s: %s samples of the split %s are held out", self.path, f"{len(part):,}", name)
                return part
        return None

    def _load(self, split: str, rows: datasets.Dataset, lenient: bool = False) -> None:
        self.split, self.rows = split, rows
        self.labels = np.full(len(rows), -1)
        if self.label_column is not None:
            texts = _texts(rows, self.label_column, self._names | _names(rows, self.label_column))
            self.labels = class_numbers(
                texts, self.classes, f"column {self.label_column} of split {split}", lenient=lenient
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """uint8 [C, 1, H, W] and its label; raises OSError or RuntimeError if it cannot be read."""
        return self.decode(self.read(index)), int(self.labels[index])

    def read(self, index: int) -> bytes:
        # the arrow table itself: ten times faster than a row of `datasets`, and without its decoding
        return _encoded(self.rows.data.column(self.image_column)[index].as_py())

    def encoded(self, index: int) -> bytes:
        return self.read(index)[:HEAD]

    def outline(self, index: int) -> int:
        """Number of bytes of the image, which are not copied."""
        image = self.rows.data.column(self.image_column)[index]
        data = image.get("bytes") if isinstance(image, Mapping) else image
        return -1 if data is None or not hasattr(data, "as_buffer") or not data.is_valid else data.as_buffer().size

    def modified(self, index: int) -> str:
        return self.rows._fingerprint

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
    if local is None:
        try:
            on_hub = map(str, datasets.get_dataset_split_names(path, config_name=subset))
        except (OSError, ValueError) as error:
            hub = "cannot be reached" if "reach" in f"{error}" else "has no such data set"
            message = f"dataset.path={path}: is not on this machine, and the hub {hub}: {error}"
            raise ValueError(message) from error
        load = partial(datasets.load_dataset, path, name=subset)
        return {split: partial(_open, f"split {split} of {path}", partial(load, split=split)) for split in on_hub}
    if (local / "dataset_dict.json").exists() or (local / "dataset_info.json").exists():
        saved = _open(f"dataset.path={path}", partial(datasets.load_from_disk, str(local)))
        parts = saved if isinstance(saved, Mapping) else {names[0]: saved}
        return {
            split: partial(_open, f"split {split} of {path}", rows.flatten_indices) for split, rows in parts.items()
        }
    files = _parquet_files(local, subset, names)
    log.info("%s: %s", path, ", ".join(f"{len(paths)} files of the split {split}" for split, paths in files.items()))
    return {split: partial(_open_parquet, path, split, paths) for split, paths in files.items()}


def _open_parquet(path: str, split: str, files: list[str]) -> datasets.Dataset:
    import datasets

    load = partial(datasets.load_dataset, "parquet", data_files={split: files}, split=split)
    return _open(f"split {split} of {path}", load, files)


def _open(what: str, load: Callable[[], Any], files: Sequence[str] = ()) -> Any:
    """The rows of a split. Raises ValueError if they cannot be read or there are none."""
    from datasets.exceptions import DatasetsError
    from pyarrow import ArrowException

    columns = column_names(files, what)
    try:
        rows = load()
    except (DatasetsError, ArrowException, *ERRORS) as error:
        reason = _unlike_the_first(files, columns) or " ".join(str(error.__cause__ or error).split())[:300]
        raise ValueError(f"{what} cannot be read: {reason}") from error
    if not len(rows):
        raise ValueError(f"{what} has no rows")
    return rows


def _unlike_the_first(files: Sequence[str], columns: Sequence[list[str]]) -> str:
    """The first parquet file that has other columns than the first, with the difference; empty if there is none."""
    others = (
        f"{file} has the columns {', '.join(names)}, {files[0]} has {', '.join(columns[0])}"
        for file, names in zip(files, columns, strict=False) if names != columns[0]
    )  # fmt: skip
    return next(others, "")


def _parquet_files(path: Path, subset: str | None, names: Sequence[str]) -> dict[str, list[str]]:
    """Files of each split: the name of the file, or else of the nearest folder above it, begins with the split's.

    Files that name no split are those of the first if no file names that; else they are left out with a warning.
    """
    files = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    if subset is not None:
        files = [file for file in files if subset in file.relative_to(path).parts[:-1]]
        if not files:
            raise ValueError(f"dataset.subset={subset}: no folder of this name with .parquet files; {content(path)}")
    if not files:
        raise ValueError(f"dataset.path={path}: no .parquet file in it")
    splits: dict[str | None, list[str]] = {}
    for file in files:
        splits.setdefault(_split_of(file.relative_to(path).parts, names), []).append(str(file))
    others = splits.pop(None, [])
    if others and names[0] in splits:
        log.warning("%s: %d files that name no split are left out, as %s", path, len(others), others[0])
    elif others:
        splits[names[0]] = others
    return {split: paths for split, paths in splits.items() if split is not None}


def _split_of(parts: Sequence[str], names: Sequence[str]) -> str | None:
    """The split that the file name, or else the nearest folder above it, begins with."""
    splits = {"training": "train", "dev": "validation"} | {name.lower(): name for name in names}
    words = (re.split(r"[-_.]", part)[0].lower() for part in reversed(parts))
    return next((splits[word] for word in words if splits.get(word) in names), None)


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


def _label_column(rows: datasets.Dataset, column: str | None) -> tuple[str | None, tuple[str, ...]]:
    """The column of the labels and the classes; a column that nobody named is not used if it cannot hold classes."""
    if column is not None:
        try:
            return _existing_column(rows, column, "dataset.label_column"), _class_names(rows, column)
        except ValueError as error:
            raise ValueError(f"dataset.label_column={column}: {error}") from error
    categories = [name for name, feature in rows.features.items() if type(feature).__name__ == "ClassLabel"]
    for name in [*(name for name in LABEL_NAMES if name in rows.features), *categories]:
        try:
            return name, _class_names(rows, name)
        except ValueError as error:
            log.warning("the column %s is not used for labels: %s", name, error)
    return None, ()


def _existing_column(rows: datasets.Dataset, column: str, key: str) -> str:
    if column not in rows.features:
        raise ValueError(f"{key}={column}: no such column; {_columns(rows)}")
    return column


def _columns(rows: datasets.Dataset) -> str:
    return "the columns are " + ", ".join(f"{name} ({type(f).__name__})" for name, f in rows.features.items())


def _class_names(rows: datasets.Dataset, column: str) -> tuple[str, ...]:
    """From the column's own names, from a second column `<label>_name`, or the values themselves."""
    if names := getattr(rows.features[column], "names", None):
        return tuple(names)
    kind = str(getattr(rows.features[column], "dtype", "list"))
    if not re.match("string|large_string|u?int|bool", kind):
        raise ValueError(f"expected integers or strings, the column holds {kind}")
    names = _names(rows, column)
    return tuple(names.get(number) or number for number in class_names(_texts(rows, column, {})))


def _names(rows: datasets.Dataset, column: str | None) -> dict[str, str]:
    """Number of a class, as text -> its name, as far as the rows tell."""
    if column is None:
        return {}
    if names := getattr(rows.features[column], "names", None):
        return {str(number): name for number, name in enumerate(names)}
    if f"{column}_name" not in rows.features or "string" in str(rows.features[column].dtype):
        return {}
    return dict(zip(_texts(rows, column, {}), _texts(rows, f"{column}_name", {}), strict=True))


def _texts(rows: datasets.Dataset, column: str, names: Mapping[str, str]) -> list[str]:
    """The labels as text: the name of a class if `names` has it, else its number; empty without a label."""
    values = rows.data.column(column).to_pylist()
    texts = ["" if value is None else value if isinstance(value, str) else str(int(value)) for value in values]
    return [names.get(text) or text for text in texts]


def _encoded(image: Any) -> bytes:
    """The bytes of {bytes, path} or of bytes."""
    data = image.get("bytes") or Path(image["path"]).read_bytes() if isinstance(image, dict) else image
    if not isinstance(data, bytes):
        raise OSError(f"no encoded image but {type(data).__name__}")
    return data
