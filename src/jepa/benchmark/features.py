"""What is judged: pictures made into vectors, and by an encoder into tokens too."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn

from jepa.benchmark.reading import Chunk, Part
from jepa.config.schema import CropConfig
from jepa.data.transforms import Augment, EvalTransform
from jepa.errors import ConfigError, RunError
from jepa.evaluation.probe import pool_tokens
from jepa.evaluation.samples import PIXELS_SIDE, raw_batch, raw_pixels
from jepa.evaluation.types import Tuning
from jepa.layers.attention import choose_attention
from jepa.parallel.session import Session
from jepa.types import PatchGrid

POOLING = {
    "mean": "averaged over the sample",
    "mean_std": "mean and standard deviation over the sample side by side",
    "steps": "averaged over each time step of the clip, the steps side by side",
    "cls": "of which the class token is taken",
}


class Encoded(NamedTuple):
    vectors: Tensor
    """float32 [b, D] on the CPU"""
    tokens: Tensor | None = None
    """float16 [b, J, D] on the CPU"""


@dataclass(frozen=True)
class Floor:
    """Vectors made of pictures by a formula, in the workers that read them."""

    word: str
    transform: EvalTransform

    @property
    def told(self) -> str:
        return FLOORS[self.word][1]

    @property
    def digest(self) -> str:
        return _digest([self.told, self.transform.image_size])

    def reduce(self, clips: Sequence[Tensor]) -> Tensor:
        return FLOORS[self.word][0](self.transform.pictures(clips))

    def encode(self, values: Tensor, max_tokens: int) -> Encoded:
        return Encoded(values)


class Frozen:
    """Pooled tokens of an encoder, of its last `layers` blocks side by side.

    Raises ConfigError where the encoder has no such blocks or no class token.
    """

    def __init__(self, *, encoder: Any, pooling: str, layers: int, session: Session) -> None:
        num_blocks, self.prefix = len(encoder.blocks), getattr(encoder, "num_prefix_tokens", 0)
        if layers > num_blocks:
            raise ConfigError([f"layers={layers}: the encoder has {num_blocks} blocks"])
        if pooling == "cls" and self.prefix == 0:
            raise ConfigError(["pooling=cls: the encoder has no class token; use pooling=mean"])
        choose_attention(encoder, session.device, torch.bfloat16 if session.bf16 else torch.float32)
        self.encoder, self.pooling, self.layers, self.session = encoder, pooling, layers, session
        self.transform: EvalTransform = encoder.transform
        self.encoder.to(session.device)

    @cached_property
    def encoder_digest(self) -> str:
        """Of its structure, its weights and what it is shown."""
        told = hashlib.sha256(repr([str(self.encoder), self.encoder.num_heads, self.encoder.grid]).encode())
        for name, tensor in sorted(self.encoder.state_dict().items()):
            told.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            told.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        shown = self.transform
        told.update(repr([shown.image_size, shown.normalise.mean, shown.normalise.std]).encode())
        return told.hexdigest()[:16]

    @property
    def digest(self) -> str:
        return _digest([self.encoder_digest, self.pooling, self.layers, self.session.bf16])

    @property
    def told(self) -> str:
        blocks = "" if self.layers == 1 else f" of each of the last {self.layers} blocks, through the final norm,"
        return f"the encoder's tokens{blocks} in eval mode, {POOLING[self.pooling]}"

    def reduce(self, clips: Sequence[Tensor]) -> Tensor:
        return self.transform.pictures(clips)

    @torch.no_grad()
    def encode(self, values: Tensor, max_tokens: int) -> Encoded:
        """uint8 [b, C, T, H, W] -> vectors, and tokens averaged down to `max_tokens` where that is not 0."""
        clips = self.transform.normalise(values.to(self.session.device).float())
        grid = self.encoder.grid_of(clips)
        with self.session.autocast():
            layers = self._layers(clips)
        pooled = torch.cat([_pool(first, tokens, self.pooling, grid) for first, tokens in layers], dim=1)
        kept = None
        if max_tokens:
            side_by_side = torch.cat([tokens for _, tokens in layers], dim=2)  # [b, N, layers * D]
            kept = pool_tokens(side_by_side, grid, max_tokens).half().cpu()
        return Encoded(pooled.cpu(), kept)

    def _layers(self, clips: Tensor) -> list[tuple[Tensor | None, Tensor]]:
        """Of each block that counts, float32: class tokens [b, t, D] where there are any, patches [b, N, D]."""
        if self.layers == 1 and self.pooling != "cls":
            return [(None, self.encoder(clips).float())]
        with _watching(self.encoder.blocks[-self.layers :]) as seen:
            self.encoder(clips)
        found = []
        for output in seen:
            tokens = _final_norm(self.encoder, output).float()  # [b * frames that do not see each other, p + n, D]
            first = tokens[:, 0] if self.prefix else None
            shape = len(clips), -1, tokens.shape[2]
            found.append((None if first is None else first.reshape(shape), tokens[:, self.prefix :].reshape(shape)))
        return found


def _final_norm(encoder: Any, tokens: Tensor) -> Tensor:
    """That of an encoder of ours, or of the trunk of timm that it wraps."""
    return encoder.norm(tokens) if hasattr(encoder, "norm") else encoder.trunk.fc_norm(encoder.trunk.norm(tokens))


@contextmanager
def _watching(blocks: nn.ModuleList) -> Iterator[list[Tensor]]:
    """What the blocks give inside, in their order."""
    seen: list[Tensor] = []
    with ExitStack() as stack:
        for block in blocks:
            stack.callback(block.register_forward_hook(lambda *called: seen.append(called[-1])).remove)
        yield seen


def _pool(first: Tensor | None, tokens: Tensor, pooling: str, grid: PatchGrid) -> Tensor:
    """[b, t, D], [b, N, D] -> [b, d]"""
    if pooling == "cls":
        assert first is not None
        return first.mean(1)
    if pooling == "mean_std":
        return torch.cat([tokens.mean(1), tokens.std(1, correction=0)], dim=1)
    if pooling == "steps":
        return tokens.unflatten(1, (grid.t, -1)).mean(2).flatten(1)
    return tokens.mean(1)


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, default=str).encode()).hexdigest()[:16]


ORIENTATIONS, CELLS, BLOCK = 9, 8, 2

PIXELS = f"raw pixels from 0 to 1, averaged over frames, reduced to at most {PIXELS_SIDE} a side"

HOG = (
    f"histograms of oriented gradients (scikit-image): {ORIENTATIONS} orientations, {CELLS} cells on the shorter side, "
    f"blocks of {BLOCK}x{BLOCK} cells normalised by L2-Hys, of each pixel the channel with the largest gradient; of "
    "clips the middle frame"
)


def pixels(pictures: Tensor) -> Tensor:
    """uint8 [b, C, T, H, W] -> float32 [b, C * h * w]"""
    return raw_pixels(pictures)


def hog(pictures: Tensor) -> Tensor:
    """uint8 [b, C, T, H, W] -> float32 [b, D]; raises RunError where scikit-image is not installed."""
    features = _scikit_image()
    middle = pictures[:, :, pictures.shape[2] // 2].permute(0, 2, 3, 1).numpy()  # [b, H, W, C]
    cell = max(2, min(pictures.shape[-2:]) // CELLS)
    found: Sequence = [
        features.hog(
            image, orientations=ORIENTATIONS, pixels_per_cell=(cell, cell), cells_per_block=(BLOCK, BLOCK),
            block_norm="L2-Hys", channel_axis=-1,
        )
        for image in middle
    ]  # fmt: skip
    return torch.stack([torch.as_tensor(vector, dtype=torch.float32) for vector in found])


def _scikit_image():
    try:
        from skimage import feature
    except ImportError as error:
        raise RunError("hog needs scikit-image: pip install 'jepa-train[eval]', or leave hog out of floors") from error
    return feature


FLOORS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {"pixels": (pixels, PIXELS), "hog": (hog, HOG)}


MAX_KEPT_BYTES = 1 << 31
"""of the pictures of one part; more are read again in each epoch"""


class Pictures:
    """A part as the encoder sees it before normalising: uint8 [n, C, T, h, w]."""

    def __init__(self, part: Part, representation: Frozen, batch_size: int) -> None:
        channels, height, width = representation.encoder.clip_shape[0], *representation.transform.image_size
        frames = getattr(part.dataset, "num_frames", 1)
        self.part, self.reduce, self.batch_size = part, representation.reduce, max(1, batch_size // frames)
        self.is_kept = len(part.indices) * prod((channels, frames, height, width)) <= MAX_KEPT_BYTES
        self.rows = torch.empty(0, dtype=torch.long)
        """places in the part of the samples that could be read, after a first pass in order"""
        self._kept: list[Chunk] = []

    def in_order(self) -> Iterator[Chunk]:
        if self._kept:
            yield from self._kept
            return
        chunks, rows = [], []
        for chunk in self.part.watched(self.reduce, self.batch_size, "reading"):
            rows.append(chunk.rows)
            chunks += [chunk] if self.is_kept else []
            yield chunk
        self._kept, self.rows = chunks, torch.cat(rows)

    def shuffled(self, batch_size: int, rng: Generator) -> Iterator[Chunk]:
        if not self.is_kept:
            order = torch.randperm(len(self.part.indices), generator=rng)
            yield from self.part.read(self.reduce, batch_size, order)
            return
        if not self._kept:
            list(self.in_order())
        places = [(chunk, row) for chunk in self._kept for row in range(len(chunk.rows))]
        for some in torch.randperm(len(places), generator=rng).split(batch_size):
            columns = zip(
                *([part[row] for part in chunk] for chunk, row in (places[i] for i in some.tolist())), strict=True
            )
            yield Chunk(*(torch.stack(column) for column in columns))


def tuning_of(
    representation: Frozen, train: Pictures, test: Pictures, crops: CropConfig, session: Session, seed: int
) -> Tuning:
    """Crops are those of `crops`, of the pictures that probes see."""
    normalise, size = representation.transform.normalise, representation.transform.image_size
    augment = Augment(
        image_size=size, mean=normalise.mean, std=normalise.std, flip=crops.flip,
        crop_scale=(crops.crop_scale[0], crops.crop_scale[1]), crop_aspect=(crops.crop_aspect[0], crops.crop_aspect[1]),
    )  # fmt: skip
    return Tuning(
        backbone=representation.encoder, device=session.device, seed=seed, autocast=session.autocast,
        train=partial(_augmented, augment, train, session), val=partial(_plain, representation, test, session),
        should_stop=lambda: False, num_train=len(train.part.indices),
    )  # fmt: skip


def _augmented(
    augment: Augment, train: Pictures, session: Session, batch_size: int, rng: Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    for chunk in train.shuffled(batch_size, rng):
        yield augment(raw_batch(chunk.values, session.device), rng).clips, chunk.labels.to(session.device)


def _plain(representation: Frozen, test: Pictures, session: Session) -> Iterator[Tensor]:
    for chunk in test.in_order():
        yield representation.transform.normalise(chunk.values.to(session.device).float())
