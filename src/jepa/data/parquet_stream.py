"""Parquet files on a server as rows by number: file after file is copied when its pictures are needed.

Footers and columns without pictures are read by their bytes and kept in the user's cache, so that the number of rows
and all labels are known before any file is copied. In the cache of files, a file becomes an Arrow file with its
pictures alone, of which any row is read without decoding those around it.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jepa.data.folders import locked, user_cache
from jepa.data.parquet import ERRORS, as_value_errors
from jepa.data.remote import RemoteFile, each, read_range
from jepa.data.shard_cache import ShardCache
from jepa.errors import SourceError

log = logging.getLogger(__name__)
BATCH_ROWS = 64
MAX_OPEN_TABLES = 32
FOOTER_BYTES = 1 << 16
"""Bytes at the end of a file that are read at once: they hold most footers."""


class StreamedRows:
    """The rows of parquet files in their order, with as much of the interface of `datasets.Dataset` as is used here."""

    def __init__(self, files: Sequence[RemoteFile], cache: tuple[str | None, float]) -> None:
        import datasets

        self.files, self._cache = files, cache
        if whole := next((file for file in files if not file.has_ranges), None):
            raise SourceError(f"{whole}: the server sends whole files only; download them and give their folder")
        table = _kept(f"footers {[file.identity for file in files]}", partial(_footers, files))
        self.counts = np.array(table.column("counts").to_pylist(), dtype=np.int64)
        self.features = datasets.Features.from_arrow_schema(_schema_of(table))
        self.data = self

    def __len__(self) -> int:
        return int(self.counts.sum())

    @property
    def _fingerprint(self) -> str:
        return hashlib.blake2b(repr([file.identity for file in self.files]).encode()).hexdigest()

    def column(self, name: str) -> Any:
        """A whole column; it is read once and kept."""
        key = f"column {name} {[file.identity for file in self.files]}"
        return _kept(key, partial(_read_column, self.files, name)).column(name)

    def images(self, column: str) -> StreamedImages:
        return StreamedImages(self.files, self.counts, column, ShardCache(*self._cache, kind=f"arrow {column}"))

    def part(self, num_files: int) -> StreamedRows:
        """The rows of the first files."""
        return StreamedRows(self.files[:num_files], self._cache)


class StreamedImages:
    """A column of pictures by number of the row, through the cache."""

    def __init__(self, files: Sequence[RemoteFile], counts: np.ndarray, column: str, cache: ShardCache) -> None:
        self.files, self.column, self.cache = files, column, cache
        self.starts = np.cumsum(counts) - counts
        cache.convert = partial(_to_arrow, column=column)
        self._tables: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": {}}

    def locate(self, row: int) -> tuple[int, int]:
        """Number of the file, and of the row in it."""
        file = int(np.searchsorted(self.starts, row, side="right")) - 1
        return file, row - int(self.starts[file])

    def __getitem__(self, row: int) -> Any:
        """A scalar of arrow. Raises SourceError if the file cannot be copied."""
        number, offset = self.locate(row)
        file = self.files[number]
        if (descriptor := self.cache.open(file)) is not None:
            os.close(descriptor)  # opened to note that the file is in use
        else:
            self._tables.pop(number, None)
            self.cache.fetch(file)
        table = self._tables.pop(number, None)
        if table is None:
            table = _open_arrow(self.cache.path(file))
            if len(self._tables) >= MAX_OPEN_TABLES:
                self._tables.pop(next(iter(self._tables)))
        self._tables[number] = table  # last in the dictionary: most recent
        return table.column(self.column)[offset]

    def prefetch(self, now: Sequence[int], later: Sequence[int]) -> None:
        self.cache.prefetch([self.files[number] for number in now], [self.files[number] for number in later])


class _Parts(io.RawIOBase):
    """A file on a server for pyarrow; nothing is read ahead but the end of the file, which holds its footer."""

    def __init__(self, file: RemoteFile) -> None:
        self.file, self.position = file, 0
        self.start = max(0, file.size - FOOTER_BYTES)
        self.end = read_range(file, self.start, FOOTER_BYTES)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        begin = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.file.size}[whence]
        self.position = begin + offset
        return self.position

    def read(self, size: int = -1) -> bytes:
        size = self.file.size - self.position if size < 0 else size
        if self.position >= self.start:
            data = self.end[self.position - self.start :][:size]
        else:
            data = read_range(self.file, self.position, size)
        self.position += len(data)
        return data


def _footers(files: Sequence[RemoteFile]) -> Any:
    """A table with the number of rows of each file; its metadata hold the schema, which all files share."""
    import pyarrow
    from pyarrow import parquet

    def read(file: RemoteFile) -> tuple[int, Any]:
        with _as_source_errors(file):
            metadata = parquet.read_metadata(_Parts(file))
            if not 0 <= metadata.num_rows <= file.size:
                raise ValueError(f"its header states {metadata.num_rows:,} rows, more than the file has bytes")
            return metadata.num_rows, metadata.schema.to_arrow_schema()

    log.info("reading the footers of %d parquet files, once", len(files))
    counts, schemas = zip(*each(read, files), strict=True)
    for file, schema in zip(files, schemas, strict=True):
        if schema.names != schemas[0].names:
            names = f"{file} has the columns {', '.join(schema.names)}, {files[0]} has {', '.join(schemas[0].names)}"
            raise SourceError(f"{names}; give files of one kind")
    table = pyarrow.table({"counts": list(counts)})
    return table.replace_schema_metadata({"schema": schemas[0].serialize().to_pybytes()})


def _schema_of(table: Any) -> Any:
    import pyarrow

    return pyarrow.ipc.read_schema(pyarrow.py_buffer(table.schema.metadata[b"schema"]))


def _read_column(files: Sequence[RemoteFile], name: str) -> Any:
    import pyarrow
    from pyarrow import parquet

    def read(file: RemoteFile) -> Any:
        with _as_source_errors(file):
            return parquet.ParquetFile(_Parts(file)).read(columns=[name]).replace_schema_metadata(None)

    log.info("reading the column %s of %d parquet files, once", name, len(files))
    return pyarrow.concat_tables(each(read, files), promote_options="permissive")


def _kept(key: str, make: Callable[[], Any]) -> Any:
    """A table that is made once and kept in the user's cache."""
    import pyarrow

    path = user_cache() / f".table-{hashlib.blake2b(key.encode(), digest_size=8).hexdigest()}.arrow"
    with suppress(pyarrow.ArrowException, *ERRORS):
        return _open_arrow(path)
    with suppress(OSError), locked(path.parent / ".table.lock"):
        with suppress(pyarrow.ArrowException, *ERRORS):
            return _open_arrow(path)  # written by another rank in the meantime
        table = make()
        part = path.with_suffix(f".{os.uname().nodename}-{os.getpid()}.part")
        with pyarrow.OSFile(str(part), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        os.replace(part, path)
        return table
    return make()


def _to_arrow(source: Path, target: Path, column: str) -> None:
    """Write a column of a parquet file as an Arrow file. Raises ValueError if it cannot be read."""
    import pyarrow
    from pyarrow import parquet

    with as_value_errors("the copy of it"), parquet.ParquetFile(source) as file:
        schema = pyarrow.schema([file.schema_arrow.field(column)])
        with pyarrow.OSFile(str(target), "wb") as sink, pyarrow.ipc.new_file(sink, schema) as writer:
            for batch in file.iter_batches(BATCH_ROWS, columns=[column]):
                writer.write_batch(batch.cast(schema) if batch.schema != schema else batch)


def _open_arrow(path: Path) -> Any:
    """A table in the memory of the file."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as source:
        return pyarrow.ipc.open_file(source).read_all()


@contextmanager
def _as_source_errors(file: RemoteFile) -> Iterator[None]:
    try:
        with as_value_errors(str(file)):
            yield
    except ValueError as error:
        raise SourceError(str(error)) from error
