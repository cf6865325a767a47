"""What a data set consists of, compared when a run or a table of results goes on with it.

The digest depends on the contents of some samples and on all labels, not on paths or times of files: a data set that
was moved or copied is the same. Data of files have a second digest, which covers more of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jepa.types import Dataset, DatasetTraits, Sample

NUM_OUTLINED, NUM_READ = 20_000, 1_000
"""Numbers of files of which the size, and of which the beginning enters the digest of files."""
NUM_ENCODED, NUM_DECODED = 64, 8
"""Number of samples whose contents enter a digest: of data with encoded bytes, and of others, which are decoded."""
UNREADABLE = (OSError, RuntimeError)


def identity(dataset: Dataset) -> dict[str, Any]:
    """Number of samples, class names and digests of a data set, to be saved as JSON."""
    return {
        "num_samples": len(dataset),
        "classes": list(dataset.classes),
        "digest": digest_of_samples(dataset, range(len(dataset))),
        "files": digest_of_files(dataset, range(len(dataset))),
    }


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two identities, each with both sides; empty if nothing does."""
    differences = []
    if before["num_samples"] != now["num_samples"]:
        differences.append(f"{before['num_samples']:,} samples then, {now['num_samples']:,} now")
    if before["classes"] != now["classes"]:
        differences.append(f"classes {_listed(before['classes'])} then, {_listed(now['classes'])} now")
    if not differences and before["digest"] != now["digest"]:
        differences.append(f"as many samples, but other contents or labels ({before['digest']}, {now['digest']})")
    elif not differences and before.get("files") not in (None, now.get("files")):
        differences.append(f"as many samples, but some files are others ({before['files']}, {now.get('files')})")
    return differences


def has_grown(before: Mapping[str, Any], dataset: Dataset) -> bool:
    """True if a data set that may grow has more samples than then, and those of then are the same."""
    count = before["num_samples"]
    if not DatasetTraits.of(dataset).grows or count >= len(dataset) or before["classes"] != list(dataset.classes):
        return False
    return digest_of_samples(dataset, range(count)) == before["digest"]


def digest_of_samples(dataset: Dataset, indices: Sequence[int]) -> str:
    """Hash of the labels of these samples and of the contents of some of them, evenly spaced."""
    digest = hashlib.sha256(f"{len(indices)}".encode())
    traits = DatasetTraits.of(dataset)
    labels = traits.labels
    if labels is not None:
        digest.update(np.ascontiguousarray(np.asarray(labels, dtype=np.int64)[np.asarray(indices)]).tobytes())
    chosen = _spaced(indices, NUM_ENCODED if traits.encoded else NUM_DECODED)
    traits.prepare(chosen)
    for index in chosen:
        digest.update(content_of(dataset, index))
    return digest.hexdigest()[:16]


def digest_of_files(dataset: Dataset, indices: Sequence[int]) -> str | None:
    """Hash of the sizes of 20,000 files and of the beginnings of 1,000, evenly spaced; None for data of other kinds."""
    outline = DatasetTraits.of(dataset).outline
    if outline is None:
        return None
    digest = hashlib.sha256()
    for index in _spaced(indices, NUM_OUTLINED):
        try:
            digest.update(repr(outline(index)).encode())
        except UNREADABLE:
            digest.update(b"unreadable")
    chosen = _spaced(indices, NUM_READ)
    DatasetTraits.of(dataset).prepare(chosen)
    for index in chosen:
        digest.update(hashlib.sha256(content_of(dataset, index)).digest())
    return digest.hexdigest()[:16]


def _spaced(indices: Sequence[int], count: int) -> list[int]:
    positions = np.linspace(0, len(indices) - 1, min(count, len(indices))).round().astype(int)
    return [int(indices[position]) for position in positions.tolist()]


def content_of(dataset: Dataset, index: int) -> bytes:
    """The encoded bytes of a sample, or its pixels if they are the same every time that they are read."""
    encoded = DatasetTraits.of(dataset).encoded
    try:
        if encoded is not None:
            return encoded(index)
        first, second = (Sample(*dataset[index]).clip.numpy().tobytes() for _ in range(2))
        return first if first == second else b"random"
    except UNREADABLE:
        return b"unreadable"


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    return f"({len(names)}: {shown})" if names else "(none)"
