"""Where each sample lies in tar shards of the WebDataset layout: read from the headers once and kept in a file."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jepa.config.files import MAX_BYTES, parse_json
from jepa.data.decode import SUFFIXES
from jepa.errors import FileError

log = logging.getLogger(__name__)
COLUMNS = ("shard", "offset", "size", "key", "label")
NUM_THREADS = 16
"""that read headers at once: on a file server each one is a journey"""
LONGEST_LABEL = 100
LONGEST_PATH = 4096
"""Number of characters of a member's name that are kept."""
LONGEST_HEADER = 1 << 20
"""Size in bytes of a header ahead of a member's own, which holds its long name."""
BLOCK = 512
"""bytes of a tar header, and what members are filled up to"""
_UNUSABLE = (OSError, ValueError, EOFError)
"""what numpy raises where a file is not there, or damaged"""


class Member(NamedTuple):
    name: str
    offset: int
    size: int


def read_index(shards: Sequence[Path], image_key: str | None, label_key: str) -> np.ndarray:
    """Rows of `COLUMNS` of all samples in the order of the shards; size -1 without an image, label empty without one.

    They are mapped from a file beside the shards, or in the user's cache where that folder can't be written; a shard of
    another size or time makes another file. Raises ValueError that names the damaged shards, and where.
    """
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in shards]
    wanted = json.dumps([1, stats, image_key, label_key]).encode()
    name = f".index-{hashlib.blake2b(wanted, digest_size=8).hexdigest()}.npy"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jepa-train"
    paths = (shards[0].parent / name, cache / name)
    for path in paths:
        with suppress(*_UNUSABLE):
            return _mapped(path)
    for path in paths:
        with suppress(OSError), _one_at_a_time(path.parent):  # the next where this one can't be written
            with suppress(*_UNUSABLE):
                return _mapped(path)  # another rank has written it in the meantime
            _write(path, _read_all(shards, image_key, label_key))
            return _mapped(path)
    log.warning("the index of the shards is not kept: neither %s nor %s can be written", *paths)
    return _read_all(shards, image_key, label_key)


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """The other ranks wait; on file systems without locks each does the work, which harms nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".index.lock", "w") as lock:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _mapped(path: Path) -> np.ndarray:
    rows = np.load(path, mmap_mode="r")
    if not isinstance(rows, np.ndarray) or rows.dtype.names != COLUMNS or rows.ndim != 1:
        raise ValueError(f"{path} is no index")
    return rows


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
        found = list(pool.map(read, range(len(shards)), shards))
    faults = [part for part in found if isinstance(part, str)]
    if faults:
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ValueError(f"dataset.shards: {'; '.join(faults[:5])}{more}")
    return np.concatenate([part for part in found if not isinstance(part, str)])


def _read(number: int, shard: Path, suffixes: Sequence[str], label_key: str) -> np.ndarray | str:
    """The rows of a shard, or what is wrong with it."""
    rows = []
    try:
        with open(shard, "rb", buffering=0) as file:
            samples = _samples(file.fileno())
            for key, members in samples.items():
                image = next((members[suffix] for suffix in suffixes if suffix in members), Member("", 0, -1))
                label = _label(file.fileno(), members, label_key)
                rows.append((number, image.offset, image.size, os.fsencode(key), label))
    except (OSError, ValueError) as fault:
        return f"{shard}: {fault}"
    if all(size < 0 for _, _, size, _, _ in rows):
        held = ", ".join(sorted({suffix for members in samples.values() for suffix in members})[:8])
        videos = "; videos are read from files: dataset=videofolder" if "mp4" in held else ""
        return f"{shard}: no images in it (dataset.image_key), but {held or 'no sample at all'}{videos}"
    texts = (f"S{max(1, *(len(row[column]) for row in rows))}" for column in (3, 4))
    return np.array(rows, list(zip(COLUMNS, ("i4", "i8", "i8", *texts), strict=True)))


def _samples(file: int) -> dict[str, dict[str, Member]]:
    """Key -> suffix -> member: what is before the first dot of the name, folders included, and what is after it."""
    samples: dict[str, dict[str, Member]] = {}
    for member in members_of(file):
        folder, slash, base = member.name.removeprefix("./").rpartition("/")
        stem, _, suffix = base.partition(".")
        if not stem or not suffix:
            continue
        members = samples.setdefault(folder + slash + stem, {})
        if members.setdefault(suffix.lower(), member) is not member:
            raise ValueError(f"{member.name} is in it twice; write it anew")
    return samples


def _label(file: int, members: dict[str, Member], label_key: str) -> bytes:
    """The text of `.cls`, or else of the field `label_key` of `.json`."""
    member = members.get("cls") or members.get("json")
    if member is None:
        return b""
    if member.size > MAX_BYTES:
        raise ValueError(f"{member.name}: has {member.size:,} bytes, too many for a label")
    value: object = os.pread(file, member.size, member.offset)
    try:
        value = value.decode().strip() if "cls" in members else parse_json(value, member.name).get(label_key)
    except FileError as fault:
        raise ValueError(f"{fault}") from fault
    except (ValueError, AttributeError) as fault:
        raise ValueError(f"{member.name}: {fault}") from fault
    if not isinstance(value, str | int | None) or len(text := "" if value is None else str(value)) > LONGEST_LABEL:
        raise ValueError(f"{member.name}: the label is {str(value)[:40]!r}; expected a number or a name")
    return text.encode()


def members_of(file: int) -> Iterator[Member]:
    """The files in an open tar, ten times faster than by tarfile; ValueError names the byte where it is damaged."""
    place, length = 0, os.fstat(file).st_size
    said: dict[str, str] = {}
    while (header := os.pread(file, BLOCK, place)) != bytes(BLOCK):
        if len(header) < BLOCK:
            raise ValueError(f"cut off at byte {length}, it has no end; fetch or write it again")
        if header[257:262] != b"ustar":
            raise ValueError(f"damaged, or no tar (compressed?): no header at byte {place}; fetch or write it again")
        kind, offset = header[156:157], place + BLOCK
        try:
            size = _size(header[124:136], said)
            if kind in b"xgLK" and size > LONGEST_HEADER:
                raise ValueError(f"a header of {size:,} bytes")
        except ValueError as fault:
            raise ValueError(f"damaged at byte {place} ({fault}); fetch or write it again") from fault
        if not 0 <= size <= length - offset:
            raise ValueError(f"cut off at byte {length}; fetch or write it again")
        place = offset + -(-size // BLOCK) * BLOCK
        if kind in b"xL":
            said |= _said_before(kind, os.pread(file, size, offset))
        elif kind in b"0\0":
            name, prefix = header[:100].split(b"\0")[0], header[345:500].split(b"\0")[0]
            whole = prefix + b"/" + name if header[262] == 0 and prefix else name  # POSIX splits a long one
            yield Member(said.get("path", "")[:LONGEST_PATH] or os.fsdecode(whole), offset, size)
        if kind not in b"gxLK":
            said = {}


def _said_before(kind: bytes, data: bytes) -> dict[str, str]:
    """What a header ahead of a member's own says of it: its long name (GNU), or records "LENGTH KEY=VALUE" (POSIX)."""
    if kind == b"L":
        return {"path": os.fsdecode(data.rstrip(b"\0"))}
    said: dict[str, str] = {}
    place = 0
    while place < len(data):
        digits = data[place : place + 20].partition(b" ")[0]
        end = place + int(digits)
        if end <= place + len(digits):
            raise ValueError(f"damaged: a record of {end - place} bytes; fetch or write it again")
        name, _, value = data[place + len(digits) + 1 : end - 1].partition(b"=")
        said[name.decode()] = os.fsdecode(value)
        place = end
    return said


def _size(digits: bytes, said: dict[str, str]) -> int:
    """The size of a member: octal, or above 8 GB a binary number after the byte 0x80, or what was said before."""
    size = int.from_bytes(digits[1:], "big") if digits[0] == 0x80 else int(digits.strip(b"\0 ") or b"0", 8)
    return int(said.get("size", size))
