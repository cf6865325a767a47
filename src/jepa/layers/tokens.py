"""Cutting clips into patches and choosing tokens by index."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor


def patchify(clips: Tensor, size: tuple[int, int, int]) -> Tensor:
    """[B, C, T, H, W] -> [B, N, C*t*h*w]: tokens in the order of PatchGrid, channels first within each."""
    t, h, w = size
    return rearrange(clips, "b c (nt t) (nh h) (nw w) -> b (nt nh nw) (c t h w)", t=t, h=h, w=w)


def take(tokens: Tensor, indices: Tensor) -> Tensor:
    """[B, N, D] and long [B, ...] -> [B, ..., D]: the tokens of each sample at its own indices."""
    flat = indices.flatten(1)[..., None]
    chosen = tokens.gather(1, flat.expand(-1, -1, tokens.shape[-1]))
    return chosen.unflatten(1, indices.shape[1:])
