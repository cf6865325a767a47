"""The bytes of tar shards by number and offset: of files on this machine, or of files on a server through a cache."""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from jepa.data.folders import locked, user_cache
from jepa.data.remote import RemoteFile, each, read_range
from jepa.data.shard_cache import ShardCache

log = logging.getLogger(__name__)
MAX_OPEN_FILES = 64
"""Number of open shards in each process."""
MAX_RANGES = 64
"""A shard is copied whole once a process has read more than one in so many of its bytes."""


class OpenFiles:
    """Keeps the `MAX_OPEN_FILES` most recently read shards open; a spawned process opens its own files."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths
        self._open: dict[int, int] = {}

    def read(self, shard: int, size: int, offset: int) -> bytes:
        file = self._open.pop(shard, None)
        if file is None:
            if len(self._open) >= MAX_OPEN_FILES:
                os.close(self._open.pop(next(iter(self._open))))
            file = os.open(self.paths[shard], os.O_RDONLY)
        self._open[shard] = file  # last in the dictionary: most recent
        return os.pread(file, size, offset)

    head = read

    def __reduce__(self) -> tuple[type[OpenFiles], tuple[Sequence[Path]]]:
        return OpenFiles, (self.paths,)

    def __del__(self) -> None:
        for file in self._open.values():
            os.close(file)


class RemoteFiles:
    """Reads from the cache, and copies a shard into it when more than a few of its samples are read.

    A few samples, as a look at the data takes, are read from the server by their bytes, so that they do not cost whole
    shards.
    """

    def __init__(self, files: Sequence[RemoteFile], cache: ShardCache) -> None:
        self.files, self.cache = files, cache
        self._bytes_read: Counter[int] = Counter()
        self._heads: Mapping[tuple[int, int], bytes] = {}

    def read(self, shard: int, size: int, offset: int) -> bytes:
        """Raises SourceError if the server fails, OSError if the cache does."""
        file = self.files[shard]
        data = self.cache.read(file, size, offset)
        while data is None:
            self._bytes_read[shard] += size
            is_cheap = file.has_ranges and self._bytes_read[shard] * MAX_RANGES < file.size
            if (is_cheap and not self.cache.is_coming(file)) or not self.cache.fetch(file):
                return read_range(file, offset, size)
            data = self.cache.read(file, size, offset)
        return data

    def prefetch(self, now: Sequence[int], later: Sequence[int]) -> None:
        """Copy these shards in the background, the first ones first."""
        self.cache.prefetch([self.files[shard] for shard in now], [self.files[shard] for shard in later])

    def head(self, shard: int, size: int, offset: int) -> bytes:
        """As `read`, of bytes that `prepare` has asked for if possible."""
        head = self._heads.get((shard, offset))
        return self.read(shard, size, offset) if head is None else head

    def prepare(self, rows: np.ndarray) -> None:
        """Read the parts (shard, offset, size) [n, 3], many at a time; they are stored in the user's cache."""
        digest = hashlib.blake2b(rows.tobytes(), digest_size=8)
        digest.update(repr([file.identity for file in self.files]).encode())
        path = user_cache() / f".heads-{digest.hexdigest()}.npz"
        with suppress(OSError), locked(path.parent / ".heads.lock"):
            heads = _load(path, len(rows))
            if heads is None:
                log.info("reading the beginnings of %d samples by which the data are recognised, once", len(rows))
                heads = each(self._part, rows.tolist())
                self._keep(rows, heads)
                ends = np.cumsum([len(head) for head in heads])
                part = path.with_suffix(f".{os.uname().nodename}-{os.getpid()}.part.npz")
                np.savez(part, ends=ends, data=np.frombuffer(b"".join(heads), np.uint8))
                os.replace(part, path)
            self._keep(rows, heads)

    def _keep(self, rows: np.ndarray, heads: Sequence[bytes]) -> None:
        self._heads = {(shard, offset): head for (shard, offset, _), head in zip(rows.tolist(), heads, strict=True)}

    def _part(self, row: Sequence[int]) -> bytes:
        shard, offset, size = row
        data = self.cache.read(self.files[shard], size, offset)
        return read_range(self.files[shard], offset, size) if data is None else data


def _load(path: Path, count: int) -> list[bytes] | None:
    """The stored parts; None if the file is missing or damaged."""
    try:
        with np.load(path) as stored:
            ends, data = stored["ends"].tolist(), stored["data"].tobytes()
    except (OSError, ValueError, LookupError, EOFError, BadZipFile):
        return None
    if len(ends) != count or (ends and ends[-1] != len(data)):
        return None
    return [data[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]
