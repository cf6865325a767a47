"""Stems: what a token sees of its patch, before the transformer.

A stem takes pictures [b, C, H, W] and returns [b, n, P], a vector of `width` P for each patch in row-major order. The
frames of a tubelet are channels of one picture, so that the filters of a stem reach over its time as over its channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers.norm import LayerNorm2d
from torch import Generator, Tensor, nn

from jepa.layers.dictionary import DictionaryStem, chunks, principal_embedding
from jepa.layers.tokens import gather_tokens
from jepa.types import PatchGrid

NUM_FILTERS = 128
"""Filters of a dictionary by default."""
NUM_FITTED_TOKENS = 50_000
"""Tokens whose principal components a dictionary's tokens are embedded by."""


def make_stem(
    kind: str, channels: int, patch_size: tuple[int, int], width: int | None, embed_dim: int, frozen: float = 1.0
) -> Any:
    """The stem that encoder.stem names. Raises ValueError if it cannot have patches of this size."""
    if frozen < 1 and kind != "dictionary":
        raise ValueError(f"encoder.stem_frozen={frozen}: stem={kind} is always trained; only a dictionary is not")
    if kind == "linear":
        if width is not None:
            raise ValueError(f"encoder.stem_width={width}: stem=linear has none; leave it out, or choose another stem")
        return PixelStem(channels, patch_size)
    if kind == "dictionary":
        return DictionaryStem(channels, patch_size, num_filters=width or NUM_FILTERS, frozen=frozen)
    return ConvStem(channels, patch_size, width=width or embed_dim, residual=kind == "residual")


class PixelStem(nn.Module):
    """The pixels of each patch, channels first."""

    def __init__(self, channels: int, patch_size: tuple[int, int]) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.width = channels * math.prod(patch_size)

    def forward(self, pictures: Tensor) -> Tensor:
        """[b, C, H, W] -> [b, n, C h w]"""
        height, width = self.patch_size
        return rearrange(pictures, "b c (y h) (x w) -> b (y x) (c h w)", h=height, w=width)


class ConvStem(nn.Module):
    """Convolutions that halve the picture (Xiao et al. 2021), up to the largest power of two that divides the patch.

    The channels double up to `width`. Each halving may be followed by a residual block of two convolutions (He et al.
    2016). A layer norm over the channels follows each convolution. The cells that are left of a patch lie side by side.
    """

    def __init__(self, channels: int, patch_size: tuple[int, int], *, width: int, residual: bool) -> None:
        super().__init__()
        side = math.gcd(*patch_size)
        num_halvings = (side & -side).bit_length() - 1
        if num_halvings == 0 or width % 2 ** (num_halvings - 1):
            raise ValueError(
                f"encoder.patch_size={list(patch_size)}, encoder.stem_width={width}: a convolutional stem halves "
                f"patches of even sides and doubles its channels each time; use encoder.stem=linear, or a width "
                f"that is a multiple of {2 ** max(0, num_halvings - 1)}"
            )
        widths = [width // 2 ** (num_halvings - 1 - level) for level in range(num_halvings)]
        layers = []
        for before, after in zip([channels, *widths], widths, strict=False):
            layers.append(_Convolution(before, after, stride=2))
            if residual:
                layers.append(_Residual(after))
        self.first, self.hidden = layers[0], nn.Sequential(*layers[1:])
        self.cells = tuple(side // 2**num_halvings for side in patch_size)
        self.width = width * math.prod(self.cells)

    def forward(self, pictures: Tensor) -> Tensor:
        """[b, C, H, W] -> [b, n, P]"""
        height, width = self.cells
        cells = self.hidden(self.first(pictures))
        return rearrange(cells, "b p (y h) (x w) -> b (y x) (h w p)", h=height, w=width)


class _Convolution(nn.Module):
    """Convolution of 3 x 3, layer norm over the channels, GELU."""

    def __init__(self, before: int, after: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.norm = LayerNorm2d(after)
        nn.init.kaiming_normal_(self.conv.weight, nonlinearity="relu")

    def forward(self, pictures: Tensor) -> Tensor:
        return F.gelu(self.norm(self.conv(pictures)))


class _Residual(nn.Module):
    """Adds two convolutions to their input; at first the second one adds nothing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = _Convolution(width, width), nn.Conv2d(width, width, 3, padding=1, bias=False)
        nn.init.zeros_(self.second.weight)

    def forward(self, pictures: Tensor) -> Tensor:
        return pictures + self.second(self.first(pictures))


def embed_patches(
    stem: nn.Module, clips: Tensor, grid: PatchGrid, tubelet_size: int, keep: Tensor | None = None
) -> Tensor:
    """[B, C, T, H, W] -> [B, N, P], or with `keep` [B, K] only those: [B, K, P].

    What a stem's filters would see of the other patches is set to 0, the mean pixel, so that a token knows nothing of
    hidden ones.
    """
    pictures = fold_tubelets(clips, tubelet_size)
    if keep is not None and not isinstance(stem, PixelStem):
        pictures = pictures * _visible_pixels(keep, grid, pictures.shape[-2:]).to(pictures.dtype)
    patches = rearrange(stem(pictures), "(b t) n p -> b (t n) p", t=grid.t)
    return patches if keep is None else gather_tokens(patches, keep)


def fold_tubelets(clips: Tensor, tubelet_size: int) -> Tensor:
    """[B, C, T, H, W] -> [B t, C p, H, W]: the p frames of a tubelet become channels"""
    return rearrange(clips, "b c (t p) h w -> (b t) (c p) h w", p=tubelet_size)


@torch.no_grad()
def fit_stem(encoder: Any, batches: Iterable[Tensor], num_clips: int, generator: Generator) -> None:
    """Fit the encoder's dictionary, and its embedding, if any, to principal components.

    The batches hold `num_clips` clips [b, C, T, H, W], normalised, of which only the parts that are needed are kept.
    """
    grid, (_, _, *size) = encoder.grid, encoder.clip_shape
    pictures = (fold_tubelets(clips, encoder.tubelet_size) for clips in batches)
    num_kept = math.ceil(NUM_FITTED_TOKENS / (grid.h * grid.w)) if hasattr(encoder, "embed") else 0
    first = encoder.stem.fit(pictures, (grid.t * num_clips, *size), num_kept, generator)
    if num_kept:
        parts = chunks(first, len(encoder.stem.filters))
        tokens = torch.cat([encoder.stem(part).flatten(0, 1) for part in parts])
        weight, bias = principal_embedding(tokens, encoder.embed_dim, generator)
        encoder.embed.weight.copy_(weight)
        encoder.embed.bias.copy_(bias)


def _visible_pixels(keep: Tensor, grid: PatchGrid, size: Sequence[int]) -> Tensor:
    """[B, K] -> bool [B t, 1, H, W]: the pixels of the tokens in `keep`"""
    visible = torch.zeros(len(keep), grid.num_tokens, dtype=torch.bool, device=keep.device).scatter_(1, keep, True)
    patches = visible.reshape(-1, 1, grid.h, 1, grid.w, 1)
    height, width = size[0] // grid.h, size[1] // grid.w
    return patches.expand(-1, -1, -1, height, -1, width).reshape(-1, 1, *size)
