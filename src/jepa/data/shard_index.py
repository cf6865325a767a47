"""Index of the samples in tar shards of the WebDataset layout, read from the headers once and stored in a file."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jepa.data.decode import SUFFIXES
from jepa.data.folders import locked

log = logging.getLogger(__name__)
COLUMNS = ("shard", "offset", "size", "key", "label")
NUM_THREADS = 16
"""Number of threads that read headers: each header costs a round trip on a network file system."""
MAX_LABEL_LENGTH = 100
"""Largest length of a label, in characters."""
BLOCK = 512
"""Size of a tar header, and the unit of the size of a member, in bytes."""
_LOAD_ERRORS = (OSError, ValueError, EOFError)
"""Exceptions of numpy for a file that is missing or damaged."""


class Member(NamedTuple):
    name: str
    offset: int
    size: int


def read_index(shards: Sequence[Path], image_key: str | None, label_key: str) -> np.ndarray:
    """Rows of `COLUMNS` of all samples in the order of the shards; size -1 without an image, "" without a label.

    The rows are memory-mapped from a file beside the shards, or in the user's cache if that folder cannot be written;
    its name depends on the sizes and times of the shards. Raises ValueError that names damaged shards and positions.
    """
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in shards]
    identity = json.dumps([2, stats, image_key, label_key]).encode()
    name = f".index-{hashlib.blake2b(identity, digest_size=8).hexdigest()}.npy"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jepa-train"
    paths = (shards[0].parent / name, cache / name)
    for path in paths:
        with suppress(*_LOAD_ERRORS):
            return np.load(path, mmap_mode="r")
    for path in paths:
        with suppress(OSError), locked(path.parent / ".index.lock"):  # OSError: the folder cannot be written
            with suppress(*_LOAD_ERRORS):
                return np.load(path, mmap_mode="r")  # written by another rank in the meantime
            _write(path, _read_all(shards, image_key, label_key))
            return np.load(path, mmap_mode="r")
    log.warning("the index of the shards is not stored: neither %s nor %s can be written", *paths)
    return _read_all(shards, image_key, label_key)


def _write(path: Path, rows: np.ndarray) -> None:
    part = path.with_suffix(f".{os.uname().nodename}-{os.getpid()}.part")
    with open(part, "wb") as file:
        np.save(file, rows)
    os.replace(part, path)


def _read_all(shards: Sequence[Path], image_key: str | None, label_key: str) -> np.ndarray:
    log.info("reading the headers of %d shards, once", len(shards))
    suffixes = tuple(suffix[1:] for suffix in SUFFIXES) if image_key is None else (image_key.lower(),)
    read = partial(_read, suffixes=suffixes, label_key=label_key)
    with ThreadPoolExecutor(min(NUM_THREADS, len(shards))) as pool:
        results = list(pool.map(read, range(len(shards)), shards))
    if errors := [result for result in results if isinstance(result, str)]:
        more = f"; and {len(errors) - 5} more" if len(errors) > 5 else ""
        raise ValueError(f"dataset.shards: {'; '.join(errors[:5])}{more}")
    return np.concatenate(results)


def _read(number: int, shard: Path, suffixes: Sequence[str], label_key: str) -> np.ndarray | str:
    """The rows of a shard, or an error message."""
    rows = []
    try:
        with open(shard, "rb", buffering=0) as file:
            samples = _samples(file.fileno())
            for key, members in samples.items():
                image = next((members[suffix] for suffix in suffixes if suffix in members), Member("", 0, -1))
                label = _label(file.fileno(), members, label_key)
                rows.append((number, image.offset, image.size, os.fsencode(key), label))
    except (OSError, ValueError) as error:
        return f"{shard}: {error}"
    if all(size < 0 for _, _, size, _, _ in rows):
        present = ", ".join(sorted({suffix for members in samples.values() for suffix in members})[:8])
        videos = "; videos are read from files: dataset=videofolder" if "mp4" in present else ""
        return f"{shard}: no images in it (dataset.image_key), but {present or 'no sample at all'}{videos}"
    texts = (f"S{max(1, *(len(row[column]) for row in rows))}" for column in (3, 4))
    return np.array(rows, list(zip(COLUMNS, ("i4", "i8", "i8", *texts), strict=True)))


def _samples(file: int) -> dict[str, dict[str, Member]]:
    """Key -> suffix -> member: the path up to the first dot of the file name, and the rest of the name."""
    samples: dict[str, dict[str, Member]] = {}
    for member in members_of(file):
        folder, slash, base = member.name.removeprefix("./").rpartition("/")
        stem, _, suffix = base.partition(".")
        if not stem or not suffix:
            continue
        members = samples.setdefault(folder + slash + stem, {})
        if members.setdefault(suffix.lower(), member) is not member:
            raise ValueError(f"{member.name} is in it twice; write it again")
    return samples


def _label(file: int, members: dict[str, Member], label_key: str) -> bytes:
    """The text of `.cls`, else of the field `label_key` of `.json`, else empty."""
    member = members.get("cls") or members.get("json")
    if member is None:
        return b""
    value: object = os.pread(file, member.size, member.offset)
    try:
        value = value.decode().strip() if "cls" in members else json.loads(value).get(label_key)
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{member.name}: {error}") from error
    if not isinstance(value, str | int | None) or len(text := "" if value is None else str(value)) > MAX_LABEL_LENGTH:
        raise ValueError(f"{member.name}: the label is {str(value)[:40]!r}; expected a number or a name")
    return text.encode()


def members_of(file: int) -> Iterator[Member]:
    """The files in an open tar, ten times faster than by tarfile; ValueError names the byte where it is damaged.

    A hard link is the earlier file that it links to. Tars joined into one (`cat a.tar b.tar`) are read to the end.
    """
    position, length, is_ended = 0, os.fstat(file).st_size, False
    extended: dict[str, str] = {}
    earlier: dict[str, Member] = {}
    while not is_ended or position < length:
        header = os.pread(file, BLOCK, position)
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
        size = _size(header, extended)
        if not 0 <= size <= length - offset:
            raise ValueError(f"cut off at byte {length}; fetch or write it again")
        position = offset + -(-size // BLOCK) * BLOCK
        if kind in b"xLK":
            extended |= _extended(kind, os.pread(file, size, offset))
        elif kind in b"01\0":
            member = _member(header, offset, size, extended, earlier)
            earlier[member.name] = member
            yield member
        if kind not in b"gxLK":
            extended = {}


def _member(
    header: bytes, offset: int, size: int, extended: Mapping[str, str], earlier: Mapping[str, Member]
) -> Member:
    name = extended.get("path") or _name(header)
    if header[156:157] != b"1":
        return Member(name, offset, size)
    target = extended.get("linkpath") or os.fsdecode(header[157:257].split(b"\0")[0])
    if target not in earlier:
        raise ValueError(f"{name} is a hard link to {target}, which is not in front of it in the tar")
    return earlier[target]._replace(name=name)


def _size(header: bytes, extended: Mapping[str, str]) -> int:
    """Bytes of the member: octal, or above 8 GB a binary number after the byte 0x80."""
    digits = header[124:136]
    size = int.from_bytes(digits[1:], "big") if digits[0] == 0x80 else int(digits.strip(b"\0 ") or b"0", 8)
    return int(extended.get("size", size))


def _name(header: bytes) -> str:
    name, prefix = header[:100].split(b"\0")[0], header[345:500].split(b"\0")[0]
    is_posix = header[262] == 0  # POSIX splits a long name
    return os.fsdecode(prefix + b"/" + name if is_posix and prefix else name)


def _extended(kind: bytes, data: bytes) -> dict[str, str]:
    """Fields ahead of a member's own header: its long name or link (GNU), or records "LENGTH KEY=VALUE" (POSIX)."""
    if kind in b"LK":
        return {"path" if kind == b"L" else "linkpath": os.fsdecode(data.rstrip(b"\0"))}
    fields: dict[str, str] = {}
    while data:
        digits = data.partition(b" ")[0]
        name, _, value = data[len(digits) + 1 : int(digits) - 1].partition(b"=")
        fields[name.decode()] = os.fsdecode(value)
        data = data[max(1, int(digits)) :]
    return fields
