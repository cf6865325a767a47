"""Parquet files, read or refused by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NUM_THREADS = 16
"""Number of threads that read the metadata of files: each file costs round trips on a network file system."""
ERRORS = (OSError, ValueError, TypeError, LookupError, OverflowError, MemoryError)
"""Exceptions of pyarrow for damaged files, beside its own."""


def read_columns(path: Path, key: str) -> dict[str, list[Any]]:
    """The columns of a table by name. Raises ValueError that begins with `key`."""
    try:
        return read_arrow(path, f"{key}={path}").to_pydict()
    except ImportError as error:
        raise ValueError(f"{key}={path}: parquet files need pip install 'jepa-train[hf]'") from error


def read_arrow(path: Path, where: str, columns: Sequence[str] | None = None) -> Any:
    """A table of pyarrow with these columns. Raises ValueError that begins with `where`."""
    from pyarrow import parquet

    with as_value_errors(where):
        names = _column_names(path)
        if missing := [name for name in columns or () if name not in names]:
            raise ValueError(f"it has no column {', '.join(missing)}")
        return parquet.read_table(path, columns=columns)


def column_names(files: Sequence[str], what: str) -> list[list[str]]:
    """Names of the columns of each file. Raises ValueError that begins with `what` and names a damaged file."""

    def read(file: str) -> list[str]:
        with as_value_errors(f"{what} cannot be read: {file}"):
            return _column_names(Path(file))

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return list(pool.map(read, files))


def _column_names(path: Path) -> list[str]:
    from pyarrow import parquet

    metadata = parquet.read_metadata(path)
    if not 0 <= metadata.num_rows <= path.stat().st_size:
        raise ValueError(f"its header states {metadata.num_rows:,} rows, more than the file has bytes")
    return metadata.schema.to_arrow_schema().names


@contextmanager
def as_value_errors(where: str) -> Iterator[None]:
    from pyarrow import ArrowException

    try:
        yield
    except (ArrowException, *ERRORS) as error:
        raise ValueError(f"{where}: is not readable as parquet: {' '.join(str(error).split())[:240]}") from error
