"""Small tar shards, and the pictures of batches as numbers."""

from __future__ import annotations

import io
import tarfile
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from jepa.data.loader import batches
from jepa.data.shards import Shards

Sample = dict[str, bytes]


def png(value: int) -> bytes:
    """A picture of one value and a width of its own."""
    stream = io.BytesIO()
    Image.fromarray(np.full((4, 4 + value % 5, 3), value % 256, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def write_shard(path: Path, samples: dict[str, Sample], tar_format: int = tarfile.GNU_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tar_format) as tar:
        for key, members in samples.items():
            for suffix, data in members.items():
                entry = tarfile.TarInfo(f"{key}.{suffix}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    return path


def numbered(begin: int, count: int, classes: int = 3) -> dict[str, Sample]:
    return {f"{n:05d}": {"png": png(n), "cls": str(n % classes).encode()} for n in range(begin, begin + count)}


def write_shards(folder: Path, counts: tuple[int, ...], name: str = "train") -> Path:
    begin = 0
    for number, count in enumerate(counts):
        write_shard(folder / f"{name}-{number:03d}.tar", numbered(begin, count))
        begin += count
    return folder


def value_of(clip: torch.Tensor) -> int:
    return int(clip[0, 0, 0, 0])


def batch_values(data: Shards, steps: int, **arguments) -> list[list[int]]:
    defaults: dict[str, Any] = {"batch_size": 4, "seed": 0, "num_workers": 0}
    stream = batches(data, **defaults | arguments)
    values = [batch.pixels[:, 0, 0, 0, 0].tolist() for batch in islice(stream, steps)]
    stream.close()
    return values
