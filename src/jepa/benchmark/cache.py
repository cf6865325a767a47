"""Features of a part of the data, made once: kept on disk under a name that says all that they depend on."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from jepa.benchmark.reading import Part
from jepa.errors import RunError
from jepa.evaluation.types import Features
from jepa.parallel.device import free_memory

GIB = 2**30
USABLE = 0.8
"""share of the free memory that tokens may take"""
FORMAT = 1
"""a change of what features mean makes older files useless"""
log = logging.getLogger(__name__)


class FeatureCache:
    """Encodes what is not there yet; holds in memory what was asked for, until it is to forget it.

    `folder` None keeps nothing on disk.
    """

    def __init__(self, folder: Path | None, batch_size: int) -> None:
        self.folder = folder
        self.batch_size = batch_size
        self.seconds = 0.0
        """that were spent encoding"""
        self._held: dict[str, dict[str, Tensor]] = {}

    def forget(self) -> None:
        """What is held in memory."""
        self._held.clear()

    def features(self, title: str, representation: Any, part: Part, max_tokens: int = 0) -> Features:
        """Of the samples that can be read; with tokens where `max_tokens` is not 0."""
        key = hashlib.sha256(f"{FORMAT} {representation.digest} {part.digest}".encode()).hexdigest()[:24]
        names = [key, f"{key}-tokens{max_tokens}"][: 1 + bool(max_tokens)]
        found = {name: tensors for name in names if (tensors := self._load(name)) is not None}
        if len(found) < len(names):
            found = dict(zip(names, self._encode(title, representation, part, max_tokens), strict=False))
            for name, tensors in found.items():
                self._save(name, tensors)
        self._held |= found
        vectors, rows = found[key]["vectors"], found[key]["rows"]
        return Features(vectors, part.labels[rows], None, found[names[1]]["tokens"] if max_tokens else None)

    def _encode(self, title: str, representation: Any, part: Part, max_tokens: int) -> list[dict[str, Tensor]]:
        begun = time.perf_counter()
        vectors, rows, tokens, num_read = [], [], torch.empty(0), 0
        frames = getattr(part.dataset, "num_frames", 1)
        for chunk in part.watched(representation.reduce, max(1, self.batch_size // frames), f"encoding {title}"):
            encoded = representation.encode(chunk.values, max_tokens)
            vectors.append(encoded.vectors)
            rows.append(chunk.rows)
            if max_tokens:
                if not num_read:
                    tokens = _room(title, part, encoded.tokens)
                tokens[num_read : num_read + len(chunk.rows)] = encoded.tokens
            num_read += len(chunk.rows)
        made = {"vectors": torch.cat(vectors), "rows": torch.cat(rows)}
        self.seconds += time.perf_counter() - begun
        return [made, {"tokens": tokens[:num_read]}] if max_tokens else [made]

    def _load(self, name: str) -> dict[str, Tensor] | None:
        if name in self._held or self.folder is None:
            return self._held.get(name)
        path = self.folder / f"{name}.safetensors"
        try:
            return load_file(path) if path.exists() else None
        except SafetensorError as error:
            log.warning("%s is damaged (%s); its features are made again", path, error)
            return None

    def _save(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Atomically: a file is whole or not there."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        target = self.folder / f"{name}.safetensors"
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            save_file(tensors, temporary)
            os.replace(temporary, target)
        except (OSError, SafetensorError) as error:
            log.warning("features are not kept: %s; they are made again by the next command", error)
        finally:
            temporary.unlink(missing_ok=True)


def _room(title: str, part: Part, tokens: Tensor) -> Tensor:
    """For as many tokens as these [b, J, D] of each sample of the part. Raises RunError where memory has none."""
    wanted, free = len(part.indices) * tokens[0].nbytes, free_memory()
    if wanted > USABLE * free:
        key, fitting = part.name.removesuffix("ing"), int(USABLE * free / tokens[0].nbytes)
        raise RunError(
            f"encoding {title}: {tokens.shape[1]} tokens of {len(part.indices):,} {part.name} samples take "
            f"{wanted / GIB:.1f} GiB of memory, and {free / GIB:.1f} are free; give "
            f"{key}_samples={fitting} or less, or a smaller evaluator.attentive.max_tokens"
        )
    return tokens.new_empty(len(part.indices), *tokens.shape[1:])
