"""Index of the samples in tar shards of the WebDataset layout, read from the headers once and stored in a file."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jepa.config.files import MAX_BYTES, parse_json
from jepa.data.decode import SUFFIXES
from jepa.data.folders import locked, user_cache
from jepa.data.remote import RemoteFile, can_write, each, read_range, read_small, write_small
from jepa.data.shard_cache import ShardCache
from jepa.errors import FileError

log = logging.getLogger(__name__)
COLUMNS = ("shard", "offset", "size", "key", "label")
Reader = Callable[[int, int], bytes]
"""(size, offset) -> the bytes there, fewer at the end of the file."""
Shard = Path | RemoteFile
SMALL_BYTES = 1 << 16
"""Bytes of a request for a header: the next one often lies in them."""
NEAR_BYTES = 1 << 18
"""Distance of headers up to which it is faster to read what lies between them than to ask again."""
LARGE_BYTES = 1 << 22
"""Bytes of a request while headers are near and the shard has no room in the cache."""
MAX_LABEL_LENGTH = 100
"""Largest length of a label, in characters."""
MAX_NAME_LENGTH = 4096
"""Largest length of the name of a member, in characters; the rest is cut off."""
LABEL_SUFFIXES = ("cls", "json")
MAX_HEADER_BYTES = 1 << 20
"""Largest size of an extended header, which holds the long name of the next member, in bytes."""
BLOCK = 512
"""Size of a tar header, and the unit of the size of a member, in bytes."""
_LOAD_ERRORS = (OSError, ValueError, EOFError)
"""Exceptions of numpy for a file that is missing or damaged."""


class Member(NamedTuple):
    name: str
    offset: int
    size: int


def read_index(
    shards: Sequence[Shard], image_key: str | None, label_key: str, cache: ShardCache | None = None
) -> np.ndarray:
    """Rows of `COLUMNS` of all samples in the order of the shards; size -1 without an image, "" without a label.

    The rows are memory-mapped from a file beside the shards, or in the user's cache if that folder cannot be written;
    of shards on a server from the user's cache and, where it can be written, with a copy beside the shards. Its name
    depends on the sizes and times of the shards. Raises ValueError that names damaged shards and positions, SourceError
    if a server fails.
    """
    stats = [
        list(shard.identity) if isinstance(shard, RemoteFile)
        else (str(shard), shard.stat().st_size, shard.stat().st_mtime_ns)
        for shard in shards
    ]  # fmt: skip
    identity = json.dumps([2, stats, image_key, label_key]).encode()
    name = f".index-{hashlib.blake2b(identity, digest_size=8).hexdigest()}.npy"
    first, make = shards[0], partial(_read_all, shards, image_key, label_key, cache)
    paths = [user_cache() / name]
    if isinstance(first, RemoteFile):
        make = partial(_beside_or_made, f"{first.folder}/{name}", make)
    else:
        paths.insert(0, first.parent / name)
    for path in paths:
        with suppress(*_LOAD_ERRORS):
            return _load(path)
    for path in paths:
        with suppress(OSError), locked(path.parent / ".index.lock"):  # OSError: the folder cannot be written
            with suppress(*_LOAD_ERRORS):
                return _load(path)  # written by another rank in the meantime
            _write(path, make())
            return _load(path)
    log.warning("the index of the shards is not stored; none of these can be written: %s", ", ".join(map(str, paths)))
    return make()


def _beside_or_made(url: str, make: Callable[[], np.ndarray]) -> np.ndarray:
    """The index that lies beside the shards on the server, else a new one, which is stored there if that is allowed."""
    with suppress(*_LOAD_ERRORS):
        if can_write(url) and (stored := read_small(url)):
            return _checked(np.load(io.BytesIO(stored)), url)
    rows, stream = make(), io.BytesIO()
    np.save(stream, rows)
    if write_small(url, stream.getvalue()):
        log.info("the index of the shards is stored beside them: %s", url)
    return rows


def _load(path: Path) -> np.ndarray:
    return _checked(np.load(path, mmap_mode="r"), path)


def _checked(rows: object, path: object) -> np.ndarray:
    if not isinstance(rows, np.ndarray) or rows.dtype.names != COLUMNS or rows.ndim != 1:
        raise ValueError(f"{path} is no index of shards")
    return rows


def _write(path: Path, rows: np.ndarray) -> None:
    part = path.with_suffix(f".{os.uname().nodename}-{os.getpid()}.part")
    with open(part, "wb") as file:
        np.save(file, rows)
    os.replace(part, path)


def _read_all(shards: Sequence[Shard], image_key: str | None, label_key: str, cache: ShardCache | None) -> np.ndarray:
    log.info("reading the headers of %d shards, once", len(shards))
    suffixes = tuple(suffix[1:] for suffix in SUFFIXES) if image_key is None else (image_key.lower(),)
    results = each(partial(_read, suffixes=suffixes, label_key=label_key, cache=cache), list(enumerate(shards)))
    if errors := [result for result in results if isinstance(result, str)]:
        more = f"; and {len(errors) - 5} more" if len(errors) > 5 else ""
        raise ValueError(f"dataset.shards: {'; '.join(errors[:5])}{more}")
    return np.concatenate(results)


def _read(
    numbered: tuple[int, Shard], suffixes: Sequence[str], label_key: str, cache: ShardCache | None
) -> np.ndarray | str:
    """The rows of a shard, or an error message."""
    number, shard = numbered
    rows = []
    try:
        with opened(shard, cache) as (read, length):
            samples, texts = _samples(read, length)
        for key, members in samples.items():
            image = next((members[suffix] for suffix in suffixes if suffix in members), Member("", 0, -1))
            label = _label(texts, members, label_key)
            rows.append((number, image.offset, image.size, os.fsencode(key), label))
    except (OSError, ValueError) as error:
        return f"{shard}: {error}"
    if all(size < 0 for _, _, size, _, _ in rows):
        present = ", ".join(sorted({suffix for members in samples.values() for suffix in members})[:8])
        videos = "; videos are read from files: dataset=videofolder" if "mp4" in present else ""
        return f"{shard}: no images in it (dataset.image_key), but {present or 'no sample at all'}{videos}"
    texts = (f"S{max(1, *(len(row[column]) for row in rows))}" for column in (3, 4))
    return np.array(rows, list(zip(COLUMNS, ("i4", "i8", "i8", *texts), strict=True)))


@contextmanager
def opened(shard: Shard, cache: ShardCache | None = None) -> Iterator[tuple[Reader, int]]:
    """A function that reads a shard, and its length."""
    if isinstance(shard, RemoteFile):
        yield _RemoteHeaders(shard, cache).read, shard.size
        return
    with open(shard, "rb", buffering=0) as file:
        yield partial(os.pread, file.fileno()), os.fstat(file.fileno()).st_size


class _RemoteHeaders:
    """Reads headers by requests for small parts; a shard whose headers lie near each other is copied into the cache."""

    def __init__(self, shard: RemoteFile, cache: ShardCache | None) -> None:
        self.shard, self.cache = shard, cache
        self.start, self.data = 0, b""
        self.has_room = True

    def read(self, size: int, offset: int) -> bytes:
        local = self.cache.read(self.shard, size, offset) if self.cache else None
        if local is not None:
            return local
        end = self.start + len(self.data)
        if offset < self.start or offset + size > end < self.shard.size:
            is_near = bool(self.data) and 0 <= offset - end < NEAR_BYTES
            if (is_near or not self.shard.has_ranges) and self.cache and self.has_room:
                self.has_room = self.cache.fetch(self.shard)
                return self.read(size, offset)
            self.start = offset
            self.data = read_range(self.shard, offset, max(size, LARGE_BYTES if is_near else SMALL_BYTES))
        return self.data[offset - self.start :][:size]


def _samples(read: Reader, length: int) -> tuple[dict[str, dict[str, Member]], dict[int, bytes]]:
    """Key -> suffix -> member: the path up to the first dot of the file name, and the rest of the name.

    And the contents of small members with labels by offset: they are read on the way, as a server is asked in order.
    """
    samples: dict[str, dict[str, Member]] = {}
    texts: dict[int, bytes] = {}
    for member in members_of(read, length):
        folder, slash, base = member.name.removeprefix("./").rpartition("/")
        stem, _, suffix = base.partition(".")
        if not stem or not suffix:
            continue
        members, suffix = samples.setdefault(folder + slash + stem, {}), suffix.lower()
        if members.setdefault(suffix, member) is not member:
            raise ValueError(f"{member.name} is in it twice; write it again")
        if suffix in LABEL_SUFFIXES and member.size <= MAX_BYTES:
            texts[member.offset] = read(member.size, member.offset)
    return samples, texts


def _label(texts: Mapping[int, bytes], members: dict[str, Member], label_key: str) -> bytes:
    """The text of `.cls`, else of the field `label_key` of `.json`, else empty."""
    member = members.get("cls") or members.get("json")
    if member is None:
        return b""
    if member.size > MAX_BYTES:
        raise ValueError(f"{member.name}: has {member.size:,} bytes, too many for a label")
    value: object = texts[member.offset]
    try:
        value = value.decode().strip() if "cls" in members else parse_json(value, member.name).get(label_key)
    except FileError as error:
        raise ValueError(f"{error}") from error
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{member.name}: {error}") from error
    if not isinstance(value, str | int | None) or len(text := "" if value is None else str(value)) > MAX_LABEL_LENGTH:
        raise ValueError(f"{member.name}: the label is {str(value)[:40]!r}; expected a number or a name")
    return text.encode()


def members_of(read: Reader, length: int) -> Iterator[Member]:
    """The files in a tar of `length` bytes, ten times faster than by tarfile. ValueError names the damaged byte.

    A hard link is the earlier file that it links to. Tars joined into one (`cat a.tar b.tar`) are read to the end.
    """
    position, is_ended = 0, False
    extended: dict[str, str] = {}
    earlier: dict[str, Member] = {}
    while not is_ended or position < length:
        header = read(BLOCK, position)
        if len(header) < BLOCK and not is_ended:
            raise ValueError(f"cut off at byte {length}, it has no end; fetch or write it again")
        if header == bytes(BLOCK):
            is_ended, position = True, position + BLOCK
            continue
        if header[257:262] != b"ustar":
            if is_ended:
                return
            raise ValueError(f"damaged, or no tar (compressed?): no header at byte {position}; fetch or write it again")
        kind, offset, is_ended = header[156:157], position + BLOCK, False
        size = _size(header, extended, position)
        if not 0 <= size <= length - offset:
            raise ValueError(f"cut off at byte {length}; fetch or write it again")
        position = offset + -(-size // BLOCK) * BLOCK
        if kind in b"xLK":
            extended |= _extended(kind, read(size, offset), offset)
        elif kind in b"01\0":
            member = _member(header, offset, size, extended, earlier)
            earlier[member.name] = member
            yield member
        if kind not in b"gxLK":
            extended = {}


def _member(
    header: bytes, offset: int, size: int, extended: Mapping[str, str], earlier: Mapping[str, Member]
) -> Member:
    name = extended.get("path", "")[:MAX_NAME_LENGTH] or _name(header)
    if header[156:157] != b"1":
        return Member(name, offset, size)
    target = extended.get("linkpath", "")[:MAX_NAME_LENGTH] or os.fsdecode(header[157:257].split(b"\0")[0])
    if target not in earlier:
        raise ValueError(f"{name} is a hard link to {target}, which is not in front of it in the tar")
    return earlier[target]._replace(name=name)


def _size(header: bytes, extended: Mapping[str, str], position: int) -> int:
    """Bytes of the member: octal, or above 8 GB a binary number after the byte 0x80."""
    digits = header[124:136]
    try:
        size = int.from_bytes(digits[1:], "big") if digits[0] == 0x80 else int(digits.strip(b"\0 ") or b"0", 8)
        size = int(extended.get("size", size))
    except ValueError as error:
        raise _damaged(position, error) from error
    if size > MAX_HEADER_BYTES and header[156:157] in b"xgLK":
        raise _damaged(position, f"an extended header of {size:,} bytes")
    return size


def _damaged(position: int, reason: object) -> ValueError:
    return ValueError(f"damaged at byte {position} ({reason}); fetch or write it again")


def _name(header: bytes) -> str:
    name, prefix = header[:100].split(b"\0")[0], header[345:500].split(b"\0")[0]
    is_posix = header[262] == 0  # POSIX splits a long name
    return os.fsdecode(prefix + b"/" + name if is_posix and prefix else name)


def _extended(kind: bytes, data: bytes, position: int) -> dict[str, str]:
    """Fields ahead of a member's own header: its long name or link (GNU), or records "LENGTH KEY=VALUE" (POSIX)."""
    if kind in b"LK":
        return {"path" if kind == b"L" else "linkpath": os.fsdecode(data.rstrip(b"\0"))}
    fields: dict[str, str] = {}
    start = 0
    while start < len(data):
        digits = data[start : start + 20].partition(b" ")[0]
        try:
            end = start + int(digits)
            name, _, value = data[start + len(digits) + 1 : end - 1].partition(b"=")
            fields[name.decode()] = os.fsdecode(value)
        except ValueError as error:
            raise _damaged(position + start, error) from error
        if end <= start + len(digits):
            raise _damaged(position + start, f"a record of {end - start} bytes")
        start = end
    return fields
