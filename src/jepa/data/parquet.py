"""Parquet files, read or refused by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import datasets


def read_columns(path: Path, key: str) -> dict[str, list[Any]]:
    """The columns of a table by name. Raises ValueError that begins with `key`."""
    try:
        from pyarrow import parquet
    except ImportError as fault:
        raise ValueError(f"{key}={path}: parquet files need pip install 'jepa-train[hf]'") from fault
    with _reading(path, f"{key}={path}"):
        return parquet.read_table(path).to_pydict()


def open_split(load: Callable[..., datasets.Dataset], split: str, files: Sequence[str]) -> datasets.Dataset:
    """What `datasets.load_dataset` makes of local files. Raises ValueError that names the first that is damaged."""
    from datasets.exceptions import DatasetGenerationError

    for file in files:
        with _reading(Path(file), f"dataset.path: {file}"):
            pass
    where = f"dataset.path: {files[0]}" + (f" and {len(files) - 1} more" if len(files) > 1 else "")
    with _reading(None, where):
        try:
            return load("parquet", data_files={split: list(files)}, split=split)
        except DatasetGenerationError as fault:
            raise ValueError(f"{fault.__cause__ or fault}") from fault


@contextmanager
def _reading(path: Path | None, where: str) -> Iterator[None]:
    """Raise ValueError for what pyarrow raises, and where the file claims more rows than it has bytes."""
    import pyarrow
    from pyarrow import parquet

    try:
        rows = parquet.read_metadata(path).num_rows if path else 0
        if path and not 0 <= rows <= path.stat().st_size:
            raise ValueError(f"it claims {rows:,} rows, more than it has bytes")
        yield
    except (pyarrow.ArrowException, OSError, ValueError, LookupError, OverflowError, MemoryError) as fault:
        raise ValueError(f"{where}: is not readable as parquet: {' '.join(str(fault).split())[:240]}") from fault
