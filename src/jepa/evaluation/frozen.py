"""A frozen encoder: its pooled features, and the data to fine-tune a copy of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn

from jepa.data.transforms import Augment, EvalTransform
from jepa.errors import ConfigError
from jepa.evaluation.probe import pool_tokens
from jepa.evaluation.samples import Samples, raw_batch
from jepa.parallel.session import Session
from jepa.types import PatchGrid

POOLING = {
    "mean": "averaged over the sample",
    "mean_std": "mean and standard deviation over the sample side by side",
    "steps": "averaged over each time step of the clip, the steps side by side",
    "cls": "of which the class token is taken",
}


class EncodedChunk(NamedTuple):
    vectors: Tensor
    """float32 [b, D] on the CPU"""
    tokens: Tensor | None = None
    """float16 [b, J, D] on the CPU, if tokens are needed"""
    last: Tensor | None = None
    """float32 [b, N, D] on the encoder's device: the tokens of the last block"""


class FrozenEncoder:
    """Pooled tokens of the last `layers` blocks of an encoder, concatenated.

    Raises ConfigError if the encoder has too few blocks or no class token.
    """

    def __init__(
        self, *, encoder: Any, transform: EvalTransform, session: Session, pooling: str = "mean", layers: int = 1
    ) -> None:
        self.prefix = getattr(encoder, "num_prefix_tokens", 0)
        if layers > 1 and layers > len(encoder.blocks):
            raise ConfigError([f"layers={layers}: the encoder has {len(encoder.blocks)} blocks"])
        if pooling == "cls" and self.prefix == 0:
            raise ConfigError(["pooling=cls: the encoder has no class token; use pooling=mean"])
        self.encoder, self.transform, self.session = encoder, transform, session
        self.pooling, self.layers = pooling, layers

    @cached_property
    def encoder_digest(self) -> str:
        """Hash of the structure, weights and transform of the encoder."""
        digest = hashlib.sha256(repr([str(self.encoder), self.encoder.num_heads, self.encoder.grid]).encode())
        for name, tensor in sorted(self.encoder.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        normalise = self.transform.normalise
        digest.update(repr([self.transform.image_size, normalise.mean, normalise.std]).encode())
        return digest.hexdigest()[:16]

    @property
    def digest(self) -> str:
        return digest_of([self.encoder_digest, self.pooling, self.layers, self.session.bf16])

    @property
    def description(self) -> str:
        blocks = "" if self.layers == 1 else f" of each of the last {self.layers} blocks, through the final norm,"
        return f"the encoder's tokens{blocks} in eval mode, {POOLING[self.pooling]}"

    def reduce(self, clips: Sequence[Tensor]) -> Tensor:
        """uint8 [C, T, H, W] of any size -> uint8 [b, C, T, h, w] of the transform's size"""
        return self.transform.pictures(clips)

    def clips(self, pictures: Tensor) -> Tensor:
        """uint8 [b, C, T, H, W] of the transform's size -> normalised, on the device"""
        return self.transform.normalise(pictures.to(self.session.device).float())

    @torch.no_grad()
    def encode(self, pictures: Tensor, max_tokens: int = 0) -> EncodedChunk:
        """uint8 [b, C, T, H, W] -> vectors, and at most `max_tokens` tokens per sample unless that is 0"""
        clips = self.clips(pictures)
        grid = self.encoder.grid_of(clips)
        with self.session.autocast():
            layers = self._layers(clips)
        vectors = torch.cat([_pool(cls, patches, self.pooling, grid) for cls, patches in layers], dim=1)
        tokens = None
        if max_tokens:
            concatenated = torch.cat([patches for _, patches in layers], dim=2)  # [b, N, layers * D]
            tokens = pool_tokens(concatenated, grid, max_tokens).half().cpu()
        return EncodedChunk(vectors.cpu(), tokens, layers[-1][1])

    def _layers(self, clips: Tensor) -> list[tuple[Tensor | None, Tensor]]:
        """float32 class tokens [b, t, D], if there are any, and patch tokens [b, N, D] of each of the last blocks"""
        if self.layers == 1 and self.pooling != "cls":
            return [(None, self.encoder(clips).float())]
        with _record_outputs(self.encoder.blocks[-self.layers :]) as outputs:
            self.encoder(clips)
        layers = []
        for output in outputs:
            tokens = _final_norm(self.encoder, output).float()  # [b * frames encoded apart, prefix + n, D]
            shape = len(clips), -1, tokens.shape[2]
            cls = tokens[:, 0].reshape(shape) if self.prefix else None
            layers.append((cls, tokens[:, self.prefix :].reshape(shape)))
        return layers


def _final_norm(encoder: Any, tokens: Tensor) -> Tensor:
    """The final norm of a native encoder, or of the timm trunk in a wrapped one."""
    return encoder.norm(tokens) if hasattr(encoder, "norm") else encoder.trunk.fc_norm(encoder.trunk.norm(tokens))


@contextmanager
def _record_outputs(blocks: nn.ModuleList) -> Iterator[list[Tensor]]:
    """A list that receives the output of each block."""
    outputs: list[Tensor] = []
    with ExitStack() as stack:
        for block in blocks:
            stack.callback(block.register_forward_hook(lambda *call: outputs.append(call[-1])).remove)
        yield outputs


def _pool(cls: Tensor | None, tokens: Tensor, pooling: str, grid: PatchGrid) -> Tensor:
    """[b, t, D], [b, N, D] -> [b, d]"""
    if pooling == "cls":
        assert cls is not None
        return cls.mean(1)
    if pooling == "mean_std":
        return torch.cat([tokens.mean(1), tokens.std(1, correction=0)], dim=1)
    if pooling == "steps":
        return tokens.unflatten(1, (grid.t, -1)).mean(2).flatten(1)
    return tokens.mean(1)


def digest_of(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, default=str).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Tuning:
    """Data to fine-tune a copy of an encoder, from the pictures that the frozen encoder gets."""

    encoder: FrozenEncoder
    train: Samples
    val: Samples
    augment: Augment
    seed: int
    should_stop: Callable[[], bool] = lambda: False

    def crops(self, batch_size: int, rng: Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Random crops [b, C, T, H, W] and labels [b] of an epoch, on the device."""
        device = self.encoder.session.device
        for batch in self.train.shuffled(batch_size, rng):
            yield self.augment(raw_batch(batch.values, device), rng).clips, batch.labels.to(device)

    def clips(self) -> Iterator[Tensor]:
        """Validation clips [b, C, T, H, W] in order, on the device."""
        return (self.encoder.clips(batch.values) for batch in self.val.batches())


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode inside; restores the mode of each submodule."""
    modes = [(submodule, submodule.training) for submodule in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for submodule, training in modes:
            submodule.training = training
