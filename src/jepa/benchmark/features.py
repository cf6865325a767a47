"""Features of encoders and of baselines without an encoder, cached on disk."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from jepa.data.transforms import EvalTransform
from jepa.errors import RunError
from jepa.evaluation.frozen import EncodedChunk, FrozenEncoder, digest_of
from jepa.evaluation.samples import PIXELS_SIDE, Samples, raw_pixels
from jepa.evaluation.splits import LabelledSplit
from jepa.evaluation.types import Features
from jepa.layers.dictionary import CELL, DictionaryStem
from jepa.layers.stems import NUM_FILTERS, embed_patches
from jepa.layers.tokens import grid_of, make_grid
from jepa.parallel.device import free_memory
from jepa.types import PatchGrid

GIB = 2**30
USABLE = 0.8
"""Largest fraction of the free memory for tokens."""
FORMAT = 1
"""Version of the feature files, changed with the definition of the features."""
ORIENTATIONS, CELLS, BLOCK = 9, 8, 2
PIXELS = f"raw pixels from 0 to 1, averaged over frames, reduced to at most {PIXELS_SIDE} a side"
HOG = (
    f"histograms of oriented gradients (scikit-image): {ORIENTATIONS} orientations, {CELLS} cells on the shorter side, "
    f"blocks of {BLOCK}x{BLOCK} cells normalised by L2-Hys, of each pixel the channel with the largest gradient; of "
    "clips the middle frame"
)
log = logging.getLogger(__name__)


def hog(pictures: Tensor) -> Tensor:
    """uint8 [b, C, T, H, W] -> float32 [b, D]. Raises RunError without scikit-image."""
    try:
        from skimage import feature
    except ImportError as error:
        raise RunError("hog needs scikit-image: pip install 'jepa-train[eval]', or leave hog out of floors") from error
    middle = pictures[:, :, pictures.shape[2] // 2].permute(0, 2, 3, 1).numpy()  # [b, H, W, C]
    cell = max(2, min(pictures.shape[-2:]) // CELLS)
    vectors = [
        feature.hog(
            image, orientations=ORIENTATIONS, pixels_per_cell=(cell, cell), cells_per_block=(BLOCK, BLOCK),
            block_norm="L2-Hys", channel_axis=-1,
        )
        for image in middle
    ]  # fmt: skip
    return torch.from_numpy(np.stack(vectors)).float()


BASELINES: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {"pixels": (raw_pixels, PIXELS), "hog": (hog, HOG)}


@dataclass(frozen=True)
class Baseline:
    """Features computed from pixels without training, in the data workers."""

    name: str
    transform: EvalTransform

    @property
    def description(self) -> str:
        return BASELINES[self.name][1]

    @property
    def digest(self) -> str:
        return digest_of([self.description, self.transform.image_size])

    def reduce(self, clips: Sequence[Tensor]) -> Tensor:
        return BASELINES[self.name][0](self.transform.pictures(clips))

    def encode(self, values: Tensor, max_tokens: int) -> EncodedChunk:
        return EncodedChunk(values)


class DictionaryCells(nn.Module):
    """A dictionary alone, as an encoder that learns nothing: its tokens are the cells that fill each frame."""

    num_heads = 0
    description = f"cells of a dictionary of {NUM_FILTERS} filters, fitted on training pictures without labels,"

    def __init__(self, clip_shape: tuple[int, int, int, int], *, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        channels, frames, *size = clip_shape
        self.clip_shape, self.embed_dim, self.tubelet_size = clip_shape, 2 * NUM_FILTERS, 1
        self.transform = EvalTransform(image_size=(size[0], size[1]), mean=mean, std=std)
        self.grid = make_grid((frames, *size), (CELL, CELL))
        self.stem = DictionaryStem(channels, (CELL, CELL), num_filters=NUM_FILTERS)

    def grid_of(self, clips: Tensor) -> PatchGrid:
        return grid_of(clips, self.clip_shape[0], (CELL, CELL))

    def forward(self, clips: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, N, 2K]"""
        return embed_patches(self.stem, clips, self.grid_of(clips), 1)


class FeatureCache:
    """Cache of the features of splits, in memory until `clear` and in `folder`; None is without files."""

    def __init__(self, folder: Path | None, batch_size: int) -> None:
        self.folder = folder
        self.batch_size = batch_size
        self.seconds = 0.0
        """time spent encoding"""
        self._cached: dict[str, dict[str, Tensor]] = {}

    def clear(self) -> None:
        self._cached.clear()

    def features(
        self, title: str, representation: Baseline | FrozenEncoder, split: LabelledSplit, max_tokens: int = 0
    ) -> Features:
        """Features of the samples that can be read; with tokens unless `max_tokens` is 0."""
        key = hashlib.sha256(f"{FORMAT} {representation.digest} {split.version}".encode()).hexdigest()[:24]
        names = [key, f"{key}-tokens{max_tokens}"][: 1 + bool(max_tokens)]
        parts = {name: tensors for name in names if (tensors := self._load(name)) is not None}
        if len(parts) < len(names):
            parts = dict(zip(names, self._encode(title, representation, split, max_tokens), strict=False))
            for name, tensors in parts.items():
                self._save(name, tensors)
        self._cached |= parts
        vectors, rows = parts[key]["vectors"], parts[key]["rows"]
        return Features(vectors, split.labels[rows], None, parts[names[1]]["tokens"] if max_tokens else None)

    def _encode(
        self, title: str, representation: Baseline | FrozenEncoder, split: LabelledSplit, max_tokens: int
    ) -> list[dict[str, Tensor]]:
        start = time.perf_counter()
        vectors, tokens, num_read = [], torch.empty(0), 0
        samples = Samples(
            split=split, reduce=representation.reduce, batch_size=self.batch_size, title=f"encoding {title}"
        )
        for batch in samples.batches():
            encoded = representation.encode(batch.values, max_tokens)
            vectors.append(encoded.vectors)
            if encoded.tokens is not None:
                if not num_read:
                    tokens = _allocate(title, split, encoded.tokens)
                tokens[num_read : num_read + len(batch.rows)] = encoded.tokens
            num_read += len(batch.rows)
        pooled = {"vectors": torch.cat(vectors), "rows": samples.rows}
        self.seconds += time.perf_counter() - start
        return [pooled, {"tokens": tokens[:num_read]}] if max_tokens else [pooled]

    def _load(self, name: str) -> dict[str, Tensor] | None:
        if name in self._cached or self.folder is None:
            return self._cached.get(name)
        path = self.folder / f"{name}.safetensors"
        try:
            return load_file(path) if path.exists() else None
        except SafetensorError as error:
            log.warning("%s is damaged (%s); its features are computed again", path, error)
            return None

    def _save(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Write the file atomically; a failure is a warning."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        target = self.folder / f"{name}.safetensors"
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            save_file(tensors, temporary)
            os.replace(temporary, target)
        except (OSError, SafetensorError) as error:
            log.warning("features are not cached: %s; the next command computes them again", error)
        finally:
            temporary.unlink(missing_ok=True)


def _allocate(title: str, split: LabelledSplit, tokens: Tensor) -> Tensor:
    """Tokens [b, J, D] of a batch -> empty tokens of the whole split. Raises RunError if memory is short."""
    needed, free = len(split.indices) * tokens[0].nbytes, free_memory()
    if needed > USABLE * free:
        key, max_samples = split.name.removesuffix("ing"), int(USABLE * free / tokens[0].nbytes)
        raise RunError(
            f"encoding {title}: {tokens.shape[1]} tokens of {len(split.indices):,} {split.name} samples take "
            f"{needed / GIB:.1f} GiB of memory, and {free / GIB:.1f} are free; give "
            f"{key}_samples={max_samples} or less, or a smaller evaluator.attentive.max_tokens"
        )
    return tokens.new_empty(len(split.indices), *tokens.shape[1:])
