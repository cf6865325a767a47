"""Labelled images of Hugging Face data sets: from the hub or from local parquet files."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np
from torch import Tensor

from jepa.config.layouts import VALIDATION_NAMES
from jepa.config.paths import on_this_machine
from jepa.config.urls import is_url, shown
from jepa.data.folders import HEAD, FileDataset, class_names, class_numbers, is_useful_held_out
from jepa.data.loader import Order
from jepa.data.parquet import ERRORS, column_names
from jepa.data.parquet_stream import StreamedImages, StreamedRows
from jepa.data.remote import RemoteFile, find_files, list_files
from jepa.data.shard_cache import ShardCache
from jepa.data.shards import say_where, window_shuffle
from jepa.types import Channels, Positive, PositiveInt

if TYPE_CHECKING:
    import datasets

log = logging.getLogger(__name__)
File = TypeVar("File", str, RemoteFile)
LABEL_NAMES = ("label", "labels", "fine_label", "class", "target")
"""Default names of the label column, in order of preference."""


class HuggingFaceImages(FileDataset):
    """A data set of the Hugging Face hub, a local parquet file, or a folder of parquet files named after their splits.

    `path` is the name on the hub or the local path; `val=None` takes a split with a default name as the held-out part;
    columns that are None are detected by type and name. With `stream`, or if `path` is a URL, parquet files are copied
    one by one when they are needed into the folder `cache`, of at most `cache_size` gigabytes; then the rows of
    `shuffle_shards` files at a time are shuffled together, None for all, and probes see the first files only.
    """

    requires = ("hf", "datasets")
    rules = ("jepa.data.rules.local_or_hub",)
    survey = "jepa.data.survey.look"
    probe_dataset: Self | None = None

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
        stream: bool = False,
        shuffle_shards: PositiveInt | None = 8,
        cache: str | None = None,
        cache_size: Positive = 100,
    ) -> None:
        super().__init__(channels, max_value=max_value)
        self.shuffle_shards = shuffle_shards
        names = (train, *filter(None, [val]), *VALIDATION_NAMES)
        if stream or is_url(path):
            splits: dict[str, Callable[[], Any]] = find_streamed_splits(path, subset, names, (cache, cache_size))
        else:
            splits = _find_splits(path, subset, names)
        for key, split in (("train", train), ("val", val)):
            if split is not None and split not in splits:
                raise ValueError(f"dataset.{key}={split}: {path} has no such split, but {', '.join(splits)}")
        self.path = shown(path)
        rows = splits[train]()
        self.image_column = _image_column(rows, image_column)
        self.label_column, self.classes = _label_column(rows, label_column)
        self._names = _names(rows, self.label_column)
        self._load(train, rows)
        candidates = [name for name in VALIDATION_NAMES if name in splits and name != train]
        self.held_out = self._find_held_out({name: splits[name] for name in ([val] if val else candidates)}, bool(val))
        if not isinstance(rows, StreamedRows):
            self.warn_of_dark_images()
        elif len(rows.files) > (num_probed := shuffle_shards or len(rows.files)):
            self.probe_dataset = self._part(train, rows.part(num_probed), True)
            self.probe_dataset.held_out = self.held_out
            log.info("probes use the first %d of %d files of the split %s", num_probed, len(rows.files), train)

    def _find_held_out(self, splits: Mapping[str, Callable[[], datasets.Dataset]], is_named: bool) -> Self | None:
        for name, load in splits.items():
            part = self._part(name, load(), not is_named)
            if is_useful_held_out(part.labels, self.classes, f"split {name}", is_named=is_named):
                log.info("%s: %s samples of the split %s are held out", self.path, f"{len(part):,}", name)
                return part
        return None

    def _load(self, split: str, rows: Any, lenient: bool = False) -> None:
        self.split, self.rows = split, rows
        self.images = _images(rows, self.image_column)
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
        return _encoded(self.images[index].as_py())

    @property
    def streamed(self) -> StreamedImages | None:
        return self.images if isinstance(self.images, StreamedImages) else None

    @property
    def index_order(self) -> Callable[[int, int], Order] | None:
        return None if self.streamed is None else self._order_of_files

    def _order_of_files(self, batch_size: int, seed: int) -> Order:
        assert self.streamed is not None
        counts = self.rows.counts
        return window_shuffle(counts, self.shuffle_shards or len(counts), seed, self.streamed.prefetch)

    def encoded(self, index: int) -> bytes:
        """The beginning of the image; of a stream, which file it is in, so that no file is copied for it."""
        if self.streamed is not None:
            number, row = self.streamed.locate(index)
            file = self.streamed.files[number]
            return f"{file.name} {file.size} {file.version} {row}".encode()
        return self.read(index)[:HEAD]

    def outline(self, index: int) -> int:
        """Number of bytes of the image, which are not copied; of a stream, those of its file."""
        if self.streamed is not None:
            return self.streamed.files[self.streamed.locate(index)[0]].size
        image = self.images[index]
        data = image.get("bytes") if isinstance(image, Mapping) else image
        return -1 if data is None or not hasattr(data, "as_buffer") or not data.is_valid else data.as_buffer().size

    def modified(self, index: int) -> str:
        return self.rows._fingerprint

    def describe(self, index: int) -> str:
        if self.streamed is not None:
            number, row = self.streamed.locate(index)
            return f"{self.streamed.files[number]} row {row}"
        image = self.images[index].as_py()
        name = image.get("path") if isinstance(image, dict) else None
        return f"{self.path} split {self.split} row {index}" + (f" ({name})" if name else "")


def _images(rows: Any, column: str) -> Any:
    """The encoded images, by number of the row."""
    return rows.images(column) if isinstance(rows, StreamedRows) else rows.data.column(column)


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


def find_streamed_splits(
    path: str, subset: str | None, names: Sequence[str], cache: tuple[str | None, float]
) -> dict[str, Callable[[], StreamedRows]]:
    """Functions that open the splits of parquet files on a server; a name on the hub stands for those of its data set.

    A data set of the hub of other files is read from the parquet files that the hub has made of it.
    """
    if is_url(path):
        files = find_files(path, "**/*.parquet")
    else:
        url = f"hf://datasets/{path}"
        files = list_files(f"{url}/**/*.parquet") or find_files(f"{url}@refs%2Fconvert%2Fparquet", "**/*.parquet")
    folders = [PurePosixPath("/", file.folder.partition("://")[2]) for file in files]
    root = os.path.commonpath(folders)
    by_parts = {(*folder.relative_to(root).parts, file.name): file for folder, file in zip(folders, files, strict=True)}
    splits = split_files(by_parts, subset, names, shown(path))
    say_where(files, ShardCache(*cache))
    return {split: partial(StreamedRows, parts, cache) for split, parts in splits.items()}


def _parquet_files(path: Path, subset: str | None, names: Sequence[str]) -> dict[str, list[str]]:
    files = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    if not files:
        raise ValueError(f"dataset.path={path}: no .parquet file in it")
    return split_files({file.relative_to(path).parts: str(file) for file in files}, subset, names, str(path))


def split_files(
    files: Mapping[tuple[str, ...], File], subset: str | None, names: Sequence[str], where: str
) -> dict[str, list[File]]:
    """Files of each split: the name of the file, or else of the nearest folder above it, begins with the split's.

    `files` are given by the parts of their paths. Files that name no split are those of the first if no file names
    that; else they are left out with a warning.
    """
    if subset is not None:
        folders = sorted({part for parts in files for part in parts[:-1]})
        files = {parts: file for parts, file in files.items() if subset in parts[:-1]}
        if not files:
            held = f"{where} holds {', '.join(f'{name}/' for name in folders) or 'no folder'}"
            raise ValueError(f"dataset.subset={subset}: no folder of this name with .parquet files; {held}")
    splits: dict[str | None, list[File]] = {}
    for parts, file in files.items():
        splits.setdefault(_split_of(parts, names), []).append(file)
    others = splits.pop(None, [])
    if others and names[0] in splits:
        log.warning("%s: %d files that name no split are left out, as %s", where, len(others), others[0])
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
