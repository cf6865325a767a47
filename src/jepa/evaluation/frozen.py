"""A frozen encoder: its pooled features, and the data to fine-tune a copy of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn

from jepa.data.transforms import Augment, EvalTransform
from jepa.errors import ConfigError
from jepa.evaluation.readout import NUM_LAYERS, READOUTS, pool_tokens, read_tokens
from jepa.evaluation.samples import Samples, raw_batch
from jepa.layers.transformer import record_outputs
from jepa.parallel.session import Session


class EncodedChunk(NamedTuple):
    vectors: Tensor
    """float32 [b, D] on the CPU"""
    readouts: dict[str, Tensor] = {}
    """float32 [b, d] on the CPU by the name of a further readout"""
    tokens: Tensor | None = None
    """float16 [b, J, D] on the CPU, if tokens are needed"""
    last: Tensor | None = None
    """float32 [b, N, D] on the encoder's device: the tokens of the last block"""


class FrozenEncoder:
    """A readout of the tokens of the last `layers` blocks of an encoder, concatenated, and those named in `further`.

    Raises ConfigError if the encoder has too few blocks or no class token.
    """

    def __init__(
        self, *, encoder: Any, transform: EvalTransform, session: Session, readout: str = "mean", layers: int = 1,
        further: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.prefix = getattr(encoder, "num_prefix_tokens", 0)
        num_blocks = len(getattr(encoder, "blocks", ()))
        if layers > 1 and layers > num_blocks:
            raise ConfigError([f"layers={layers}: the encoder has {num_blocks} blocks"])
        if "cls" in (readout, *further) and self.prefix == 0:
            raise ConfigError(["readout=cls: the encoder has no class token; use readout=mean"])
        self.encoder, self.transform, self.session = encoder, transform, session
        self.readout, self.further = readout, further
        self.depths = dict.fromkeys((readout, *further), layers)
        """Number of last blocks that each readout takes."""
        if "layers" in self.depths:
            self.depths["layers"] = max(layers, min(NUM_LAYERS, num_blocks))

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
        return digest_of([self.encoder_digest, self.readout, self.depths[self.readout], self.session.bf16])

    @property
    def description(self) -> str:
        depth = self.depths[self.readout]
        blocks = "" if depth == 1 else f" of each of the last {depth} blocks, through the final norm,"
        tokens = getattr(self.encoder, "description", "the encoder's tokens")
        return f"{tokens}{blocks} in eval mode, {READOUTS[self.readout]}"

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
        read = {
            name: torch.cat([read_tokens(cls, patches, name, grid) for cls, patches in layers[-depth:]], dim=1).cpu()
            for name, depth in self.depths.items()
        }
        tokens = None
        if max_tokens:
            last = layers[-self.depths[self.readout] :]
            concatenated = torch.cat([patches for _, patches in last], dim=2)  # [b, N, layers * D]
            tokens = pool_tokens(concatenated, grid, max_tokens).half().cpu()
        return EncodedChunk(read.pop(self.readout), read, tokens, layers[-1][1])

    def _layers(self, clips: Tensor) -> list[tuple[Tensor | None, Tensor]]:
        """float32 class tokens [b, t, D], if there are any, and patch tokens [b, N, D] of each of the last blocks"""
        depth = max(self.depths.values())
        if depth == 1 and "cls" not in self.depths:
            return [(None, self.encoder(clips).float())]
        layers = []
        for output in record_outputs(self.encoder, clips, depth):
            tokens = _final_norm(self.encoder, output).float()  # [b * frames encoded apart, prefix + n, D]
            shape = len(clips), -1, tokens.shape[2]
            cls = tokens[:, 0].reshape(shape) if self.prefix else None
            layers.append((cls, tokens[:, self.prefix :].reshape(shape)))
        return layers


def _final_norm(encoder: Any, tokens: Tensor) -> Tensor:
    """The final norm of a native encoder, or of the timm trunk in a wrapped one."""
    return encoder.norm(tokens) if hasattr(encoder, "norm") else encoder.trunk.fc_norm(encoder.trunk.norm(tokens))


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
