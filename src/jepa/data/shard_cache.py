"""Whole files of a server in a folder of this machine: copied once by one process, the least recently used go first.

A file that is here has its final name only when it is whole. A file that was read within `LEASE` seconds stays. Its
time of modification is the time of its last use.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import accumulate
from pathlib import Path
from typing import Any

from jepa.data.folders import is_locked, locked, user_cache
from jepa.data.remote import (
    CONNECT_SECONDS,
    NUM_ATTEMPTS,
    STALL_SECONDS,
    RemoteFile,
    has_changed,
    read_range,
    read_whole,
    size_text,
)
from jepa.errors import SourceError, explain

log = logging.getLogger(__name__)
BLOCK_BYTES = 1 << 24
"""Bytes of a request while a whole file is copied: what a broken connection costs."""
LEASE = 60.0
"""Seconds after its last use in which a file is not removed."""
TOUCH = 10.0
"""Seconds after which the time of the last use is written again."""
STALE = 600.0
"""Seconds after its last write in which a half copied file is still taken for one that is being copied."""
SPARE_BYTES = 1 << 29
"""Free bytes that the cache leaves on the disk."""
NUM_PREFETCHERS = 4


class ShardCache:
    """`folder`, by default in the user's cache, of at most `gigabytes`; `convert` rewrites a file that was copied."""

    def __init__(
        self, folder: str | None, gigabytes: float, convert: Callable[[Path, Path], None] | None = None, kind: str = ""
    ) -> None:
        self.folder = Path(folder).expanduser().absolute() if folder else user_cache() / "shards"
        self.limit = int(gigabytes * 1e9)
        self.convert, self.kind = convert, kind
        self._said: set[str] = set()
        self._wanted: list[RemoteFile] = []
        self._threads: list[threading.Thread] = []

    def __str__(self) -> str:
        used = size_text(sum(size for _, size, _ in self._entries()))
        return f"{self.folder} (holds {used} of at most {self.limit / 1e9:g} GB)"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_wanted": [], "_threads": []}

    def path(self, file: RemoteFile) -> Path:
        digest = hashlib.blake2b(repr((*file.identity, self.kind)).encode(), digest_size=8).hexdigest()
        return self.folder / f"{digest}-{file.name[-80:]}"

    def open(self, file: RemoteFile) -> int | None:
        """Descriptor of the file, which the caller closes; None if it is not here."""
        try:
            descriptor = os.open(self.path(file), os.O_RDONLY)
        except FileNotFoundError:
            return None
        if time.time() - os.fstat(descriptor).st_mtime > TOUCH:
            with suppress(OSError):
                os.utime(self.path(file))
        return descriptor

    def read(self, file: RemoteFile, size: int, offset: int) -> bytes | None:
        """Bytes of a file; None if it is not here."""
        descriptor = self.open(file)
        if descriptor is None:
            return None
        try:
            return os.pread(descriptor, size, offset)
        finally:
            os.close(descriptor)

    def is_coming(self, file: RemoteFile) -> bool:
        """True while a process copies the file."""
        return is_locked(self._lock(file))

    def fetch(self, file: RemoteFile) -> bool:
        """Copy a file, or wait until another process has; False if there is no room. Raises SourceError."""
        with self._explained(), locked(self._lock(file)):
            path = self.path(file)
            if path.exists():
                os.utime(path)
                return True
            part = self._part(path)
            if not self._reserve(file, part):
                return False
            started = time.monotonic()
            self._copy(file, part)
            if self.convert is not None:
                part = self._converted(file, part)
            os.replace(part, path)
            log.debug("%s: copied %.1f MB in %.1f s", file, file.size / 1e6, time.monotonic() - started)
            return True

    def _part(self, path: Path) -> Path:
        """Name of a half copied file, of this thread alone as some file systems have no locks."""
        begin = f".{path.name}.{os.uname().nodename}-"
        for left in self.folder.iterdir() if self.folder.is_dir() else ():
            if left.name.startswith(begin) and not _is_running(int(left.stem.rpartition("-")[2])):
                left.unlink(missing_ok=True)
        return self.folder / f"{begin}{threading.get_ident()}-{os.getpid()}.part"

    def _converted(self, file: RemoteFile, raw: Path) -> Path:
        assert self.convert is not None
        converted = raw.with_suffix(".converted")
        try:
            self.convert(raw, converted)
        except ValueError as error:
            raise SourceError(f"{file}: {error}") from error
        raw.unlink()
        return converted

    def prefetch(self, now: Sequence[RemoteFile], later: Sequence[RemoteFile]) -> None:
        """Copy files in the background: those read `now`, then those read `later` as far as the cache holds both."""
        if (needed := sum(file.size for file in now)) > self.limit:
            message = (
                "the %d shards that are shuffled together have %s, more than dataset.cache_size=%g, so many are copied "
            )
            message += (
                "again and again or read sample by sample, which is slow: raise it or lower dataset.shuffle_shards"
            )
            self._say(message, len(now), size_text(needed), self.limit / 1e9)
        total = list(accumulate(file.size for file in (*now, *later)))
        self._wanted[:] = [file for file, end in zip((*now, *later), total, strict=True) if end <= self.limit]
        self._threads = [thread for thread in self._threads if thread.is_alive()]  # none in a forked process
        while len(self._threads) < NUM_PREFETCHERS:
            self._threads.append(threading.Thread(target=self._prefetch_wanted, daemon=True))
            self._threads[-1].start()

    def _prefetch_wanted(self) -> None:
        while True:
            try:
                file = self._wanted.pop(0)
            except IndexError:
                return
            with suppress(SourceError):  # who reads the file meets the error and reports it
                if not self.path(file).exists():
                    self.fetch(file)

    def _copy(self, file: RemoteFile, part: Path) -> None:
        if not file.has_ranges:
            read_whole(file, str(part))
        else:
            with open(part, "r+b") as output:
                for start in range(0, file.size, BLOCK_BYTES):
                    output.write(read_range(file, start, BLOCK_BYTES))
        if has_changed(file):
            raise SourceError(f"{file}: has changed since the run began; run the same command again")

    def _reserve(self, file: RemoteFile, part: Path) -> bool:
        """Make room for the file and hold it by a part file of its size; False if it can be read by parts as well."""
        give_up = time.monotonic() + 1.5 * LEASE  # by then, files that were in use may be removed
        while not self._hold(file, part):
            if file.has_ranges and self.convert is None:
                return False
            if file.size > self.limit or time.monotonic() > give_up:
                raise SourceError(
                    f"{file}: can be copied whole only, and its {size_text(file.size)} have no room in the cache "
                    f"{self}: raise dataset.cache_size, lower dataset.shuffle_shards, or give another dataset.cache"
                )
            time.sleep(1)
        return True

    def _hold(self, file: RemoteFile, part: Path) -> bool:
        with locked(self.folder / ".locks" / "room"):
            part.unlink(missing_ok=True)
            if not self._make_room(file):
                return False
            with open(part, "wb") as output:
                output.truncate(file.size)
            return True

    def _make_room(self, file: RemoteFile) -> bool:
        if file.size > self.limit:
            message = "%s: its %s are more than dataset.cache_size=%g; it is read sample by sample, which is slow"
            self._say(message, file, size_text(file.size), self.limit / 1e9)
            return False
        entries = sorted(self._entries(), key=lambda entry: entry[2])
        used, oldest = sum(size for _, size, _ in entries), time.time() - LEASE
        for path, size, last_use in entries:
            free = shutil.disk_usage(self.folder).free
            if used + file.size <= self.limit and free >= file.size + SPARE_BYTES:
                return True
            if last_use > oldest:
                break
            with suppress(FileNotFoundError):
                path.unlink()
            used -= size
        free = shutil.disk_usage(self.folder).free
        if free < file.size + SPARE_BYTES:
            message = "only %s are free on the disk of the cache, %s: the shards that have no room are read sample by "
            self._say(
                message + "sample, which is slow; make room, or give another dataset.cache",
                size_text(free),
                self.folder,
            )
            return False
        if used + file.size > self.limit:
            message = "the cache %s is full of files in use, so others are read sample by sample, which is slow: raise "
            self._say(message + "dataset.cache_size or lower dataset.shuffle_shards", self.folder)
            return False
        return True

    def _entries(self) -> list[tuple[Path, int, float]]:
        """Path, size and time of the last use of each file; files being copied count as in use."""
        entries = []
        for path in self.folder.glob("*") if self.folder.is_dir() else ():
            is_part = path.suffix in (".part", ".converted")
            if path.is_dir() or (path.name.startswith(".") and not is_part):
                continue
            with suppress(FileNotFoundError):
                status = path.stat()
                entries.append((path, status.st_size, status.st_mtime + STALE * is_part))
        return entries

    def _lock(self, file: RemoteFile) -> Path:
        return self.folder / ".locks" / self.path(file).name[:2]

    def _say(self, message: str, *values: object) -> None:
        if message not in self._said:
            self._said.add(message)
            log.warning(message, *values)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Raise SourceError for an error of the disk."""
        try:
            yield
        except OSError as error:
            raise SourceError(f"the cache of the shards, {self.folder}: {explain(error)} (dataset.cache)") from error


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def say_patience() -> None:
    log.info(
        "servers: %d attempts at each request, %d s to connect and %d s without a byte before the next one",
        NUM_ATTEMPTS, CONNECT_SECONDS, STALL_SECONDS,
    )  # fmt: skip
