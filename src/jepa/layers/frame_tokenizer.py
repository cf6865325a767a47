"""From the outputs of an encoder to codes of frames and back to pixels (the tokenizer of IRIS, Micheli et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from einops import rearrange
from torch import Tensor, nn

from jepa.layers.decoder import PixelDecoder
from jepa.layers.quantizers import FiniteScalarQuantizer, VectorQuantizer
from jepa.layers.tokens import patchify_pixels, token_extent, unpatchify
from jepa.types import PatchGrid

EPSILON = 1e-3
"""Added to the mean variance of a clip's pixels; clips in which nothing moves are weighted evenly."""


class Tokenized(NamedTuple):
    embedding: Tensor
    """[B, D]: mean token of the encoder"""
    vectors: Tensor
    """float32 [B, T, K, d]: of the codes"""
    codes: Tensor
    """long [B, T, K]"""
    commitment: Tensor
    """float32 scalar"""


class FrameTokenizer(nn.Module):
    """Frames as K codes each: squares of `merge` x `merge` patches share one. The encoder is not part of it.

    The decoder sees one frame, so that a frame can be drawn from its codes alone.
    """

    def __init__(
        self, *, encoder: Any, quantizer: str, num_codes: int, code_dim: int, levels: Sequence[int], merge: int,
        decoder_width: int | None, decoder_depth: int, decoder_num_heads: int | None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.merge = merge
        self.patch = token_extent(encoder)
        self.grid: PatchGrid = replace(encoder.grid, t=1)
        if self.grid.h % merge or self.grid.w % merge:
            raise ValueError(
                f"objective.merge={merge} does not divide the {self.grid.h} x {self.grid.w} patches of a frame"
            )
        self.tokens_per_frame = self.grid.num_tokens // merge**2
        if quantizer == "vq":
            self.quantizer = VectorQuantizer(num_codes=num_codes, dim=code_dim)
        else:
            self.quantizer = FiniteScalarQuantizer(levels=levels)
        self.squeeze = nn.Linear(encoder.embed_dim * merge**2, self.quantizer.dim)
        self.decoder = PixelDecoder(
            encoder=encoder, input_dim=self.quantizer.dim, width=decoder_width, depth=decoder_depth,
            num_heads=decoder_num_heads,
        )  # fmt: skip

    def forward(self, tokens: Tensor) -> Tokenized:
        """Outputs of the encoder [B, T N, D]"""
        merged = rearrange(
            tokens, "b (t h p w q) d -> b t (h w) (p q d)",
            h=self.grid.h // self.merge, w=self.grid.w // self.merge, p=self.merge, q=self.merge,
        )  # fmt: skip
        quantized = self.quantizer(self.squeeze(merged))
        embedding = tokens.float().mean(dim=1).detach()
        return Tokenized(embedding, quantized.vectors, quantized.codes, quantized.loss)

    def decode(self, vectors: Tensor) -> Tensor:
        """[B, T, K, d] -> float32 pixels [B, T, N, P]"""
        spread = rearrange(
            vectors[:, :, :, None, None].expand(-1, -1, -1, self.merge, self.merge, -1),
            "b t (h w) p q d -> (b t) (h p w q) d", h=self.grid.h // self.merge,
        )  # fmt: skip
        return self.decoder(spread, self.grid).float().unflatten(0, vectors.shape[:2])

    def pixels(self, clips: Tensor) -> Tensor:
        """[B, C, T, H, W] -> float32 [B, T, N, P]"""
        return patchify_pixels(clips, self.patch).unflatten(1, (clips.shape[2], -1))

    def to_clips(self, pixels: Tensor) -> Tensor:
        """[B, T, N, P] -> [B, C, T, H, W]"""
        return unpatchify(pixels.flatten(1, 2), replace(self.grid, t=pixels.shape[1]), self.patch)


def moving_weights(pixels: Tensor, share: float) -> Tensor:
    """[B, T, N, P] -> [B, 1, N, P], mean 1 where something moves: `share` of it by the variance of a pixel over time.

    Small things that move count as much as a large background; it stands in for the perceptual loss of IRIS, which
    needs trained weights.
    """
    variance = (pixels - pixels.mean(dim=1, keepdim=True)).square().mean(dim=1, keepdim=True)  # faster than var
    return 1 - share + share * variance / (variance.mean(dim=(2, 3), keepdim=True) + EPSILON)
