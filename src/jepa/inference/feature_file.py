"""Files of features (parquet, npz, safetensors), and the finished batches of one that is not complete yet.

Batches are files in a hidden folder beside the target. A command that was stopped goes on with those that are missing;
the target is then written batch by batch, so that only one is in memory, and replaces an earlier file at once.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file

from jepa.data.parquet import read_arrow
from jepa.errors import RunError
from jepa.runs.metrics import read_json, write_atomically

FORMAT = "jepa-train features 1"
MAX_HEADER = 100_000_000
"""Largest header in bytes that the library of safetensors reads."""
_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, SafetensorError, zipfile.BadZipFile)
"""Exceptions of the three formats for other or damaged files."""


class FeatureFile(NamedTuple):
    """The content of a file of features."""

    names: list[str]
    """of the files, relative to `facts["folder"]`"""
    features: np.ndarray
    """[n, D], or all tokens [n, N, D]"""
    labels: list[str] | None
    """class names, "" without one; None for files without classes"""
    facts: dict[str, Any]
    """run, readout, folder, unreadable files with the reason ..."""


class Batches:
    """The finished batches of a file, by number, in a folder; those of another `key` are removed."""

    def __init__(self, folder: Path, key: str) -> None:
        self.folder = folder
        if read_json(folder / "key.json").get("key") != key:
            for path in folder.glob("*.npz"):
                path.unlink()
        write_atomically(folder / "key.json", json.dumps({"key": key}))

    def numbers(self) -> list[int]:
        return sorted(int(path.stem) for path in self.folder.glob("*.npz"))

    def add(self, number: int, **arrays: Any) -> None:
        with replacing(self.folder / f"{number:09d}.npz") as file:
            np.savez(file, **arrays)

    def read(self, number: int, name: str) -> np.ndarray:
        """An array of a batch. Raises RunError if its file is damaged."""
        path = self.folder / f"{number:09d}.npz"
        try:
            with np.load(path) as arrays:
                return arrays[name]
        except _ERRORS as error:
            raise RunError(f"{path} is damaged ({error}); remove it and run the same command again") from error

    def column(self, name: str) -> list[Any]:
        """The values of an array of all batches, one after the other."""
        return [value for number in self.numbers() for value in self.read(number, name).tolist()]

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A new file that takes the place of `path` once it is written."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or f"{error}", path) from error  # a failed write names no file
    finally:
        temporary.unlink(missing_ok=True)


class _Content(NamedTuple):
    """What is written: texts by column, the facts, and the features chunk by chunk."""

    columns: Mapping[str, list[str]]
    facts: dict[str, Any]
    chunks: Iterator[np.ndarray]
    shape: tuple[int, ...]
    dtype: np.dtype


def write_features(path: Path, batches: Batches, columns: Mapping[str, list[str]], facts: Mapping[str, Any]) -> None:
    """Write the features of all batches, with columns of texts and the facts as metadata."""
    first = batches.read(batches.numbers()[0], "features")
    chunks = (batches.read(number, "features") for number in batches.numbers())
    all_facts = {"format": FORMAT, **facts, "shape": first.shape[1:]}
    writer = {".npz": _write_npz, ".safetensors": _write_safetensors, ".parquet": _write_parquet}[path.suffix]
    with replacing(path) as file:
        writer(file, _Content(columns, all_facts, chunks, (len(columns["name"]), *first.shape[1:]), first.dtype))


def _write_npz(file: IO[bytes], content: _Content) -> None:
    texts = {**content.columns, "facts": json.dumps(content.facts)}
    header = {"descr": content.dtype.str, "fortran_order": False, "shape": content.shape}
    with zipfile.ZipFile(file, "w") as archive:
        for name, values in texts.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:  # without the time
                np.lib.format.write_array(member, np.array(values, dtype=np.str_))
        with archive.open(zipfile.ZipInfo("features.npy"), "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            for chunk in content.chunks:
                member.write(chunk.tobytes())


def _write_safetensors(file: IO[bytes], content: _Content) -> None:
    size = content.dtype.itemsize
    tensor = {"dtype": f"F{8 * size}", "shape": content.shape, "data_offsets": [0, math.prod(content.shape) * size]}
    texts = {name: json.dumps(values) for name, values in {**content.columns, "facts": content.facts}.items()}
    header = json.dumps({"__metadata__": texts, "features": tensor}).encode()
    if len(header) > MAX_HEADER:
        raise RunError(f"{content.shape[0]:,} names do not fit into a file of safetensors; give out=FILE.parquet")
    header += b" " * (-len(header) % 8)
    file.write(len(header).to_bytes(8, "little") + header)
    for chunk in content.chunks:
        file.write(chunk.tobytes())


def _write_parquet(file: IO[bytes], content: _Content) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    kind, sizes, row = pa.from_numpy_dtype(content.dtype), content.shape[:0:-1], 0
    for size in sizes:
        kind = pa.list_(kind, size)
    fields = [*(pa.field(name, pa.string()) for name in content.columns), pa.field("features", kind)]
    schema = pa.schema(fields, {"jepa": json.dumps(content.facts)})
    with parquet.ParquetWriter(file, schema) as writer:
        for chunk in content.chunks:
            array = pa.array(chunk.ravel())
            for size in sizes:
                array = pa.FixedSizeListArray.from_arrays(array, size)
            texts = [pa.array(values[row : row + len(chunk)]) for values in content.columns.values()]
            writer.write_table(pa.table([*texts, array], schema=schema))
            row += len(chunk)


def read_features(path: Path, *, with_features: bool = True) -> FeatureFile:
    """The content of a file of `jepa-embed`, or its texts alone. Raises RunError for any other file."""
    reader = {".npz": _read_npz, ".safetensors": _read_safetensors, ".parquet": _read_parquet}[path.suffix]
    try:
        content = reader(path, with_features)
        if content.facts["format"] != FORMAT:
            raise ValueError(f"its format is {content.facts['format']}")
    except FileNotFoundError:
        raise
    except _ERRORS as error:
        reason = " ".join(str(error).split())[:200]
        raise RunError(f"{path} holds no features of jepa-embed ({reason}); give another file, or remove it") from error
    return content


def _read_npz(path: Path, with_features: bool) -> FeatureFile:
    with np.load(path) as arrays:
        features = arrays["features"] if with_features else np.empty(0)
        labels = arrays["label"].tolist() if "label" in arrays else None
        return FeatureFile(arrays["name"].tolist(), features, labels, json.loads(str(arrays["facts"])))


def _read_safetensors(path: Path, with_features: bool) -> FeatureFile:
    with safe_open(path, "np") as file:
        texts = {name: json.loads(text) for name, text in (file.metadata() or {}).items()}
    features = load_file(path)["features"] if with_features else np.empty(0)
    return FeatureFile(texts["name"], features, texts.get("label"), texts["facts"])


def _read_parquet(path: Path, with_features: bool) -> FeatureFile:
    from pyarrow import parquet

    names = parquet.read_schema(path).names
    table = read_arrow(path, f"{path}", None if with_features else [name for name in names if name != "features"])
    facts, features = json.loads(table.schema.metadata[b"jepa"]), np.empty(0)
    if with_features:
        array = table["features"].combine_chunks()
        while hasattr(array.type, "list_size"):
            array = array.flatten()
        features = array.to_numpy(zero_copy_only=False).reshape(-1, *facts["shape"])
    labels = table["label"].to_pylist() if "label" in names else None
    return FeatureFile(table["name"].to_pylist(), features, labels, facts)
