"""Cutting clips into patches and selecting tokens by index."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from jepa.types import Encoder, PatchGrid


def patchify(clips: Tensor, size: tuple[int, int, int]) -> Tensor:
    """[B, C, T, H, W] -> [B, N, C*t*h*w]: tokens in the order of PatchGrid, channels first within each."""
    t, h, w = size
    return rearrange(clips, "b c (nt t) (nh h) (nw w) -> b (nt nh nw) (c t h w)", t=t, h=h, w=w)


def gather_tokens(tokens: Tensor, indices: Tensor) -> Tensor:
    """[B, N, D] and long [B, ...] -> [B, ..., D]: the tokens of each sample at its own indices."""
    flat = indices.flatten(1)[..., None].expand(-1, -1, tokens.shape[-1])
    return tokens.gather(1, flat).unflatten(1, indices.shape[1:])


def count_parts(size: int, part: int, name: str, part_name: str, keys: str) -> int:
    """`size` / `part`; raises ValueError with the nearest divisible sizes and the keys to change if there is a rest."""
    count, rest = divmod(size, part)
    if not rest:
        return count
    nearest = " and ".join(str(n * part) for n in (count, count + 1) if n)
    raise ValueError(f"{name} {size} is not divisible by the {part_name}'s {part}: change {keys} (nearest: {nearest})")


def as_pair(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width, from one number for both or from two."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def grid_of(clips: Tensor, channels: int, patch_size: tuple[int, int], tubelet_size: int = 1) -> PatchGrid:
    """The grid of [B, C, T, H, W] or [B, C, H, W]; raises ValueError for other channels or sizes without a grid."""
    if clips.shape[1] != channels:
        raise ValueError(f"this encoder takes {channels} channels, got clips of {tuple(clips.shape[1:])}")
    size = (1 if clips.ndim == 4 else clips.shape[2], *clips.shape[-2:])
    if torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]; sizes are tensors, and become fixed
        size = tuple(map(int, size))
    return make_grid(size, patch_size, tubelet_size)


def make_grid(clip_size: Sequence[int], patch_size: tuple[int, int], tubelet_size: int = 1) -> PatchGrid:
    """The grid of a clip (frames, height, width); a single frame is repeated to fill a tubelet."""
    frames, height, width = clip_size
    time_keys, keys = "num_frames or encoder.tubelet_size", "image_size or encoder.patch_size"
    return PatchGrid(
        1 if frames == 1 else count_parts(frames, tubelet_size, "num_frames", "tubelet", time_keys),
        count_parts(height, patch_size[0], "image height", "patch", keys),
        count_parts(width, patch_size[1], "image width", "patch", keys),
    )


def unpatchify(tokens: Tensor, grid: PatchGrid, size: tuple[int, int, int]) -> Tensor:
    """[B, N, C*t*h*w] -> [B, C, T, H, W]: the inverse of `patchify`."""
    t, h, w = size
    return rearrange(
        tokens,
        "b (nt nh nw) (c t h w) -> b c (nt t) (nh h) (nw w)",
        nt=grid.t, nh=grid.h, nw=grid.w, t=t, h=h, w=w,
    )  # fmt: skip


def token_extent(encoder: Encoder) -> tuple[int, int, int]:
    """Frames, height and width of one token of the encoder, in pixels."""
    (_, frames, height, width), grid = encoder.clip_shape, encoder.grid
    return frames // grid.t, height // grid.h, width // grid.w


def patchify_pixels(clips: Tensor, size: tuple[int, int, int]) -> Tensor:
    """[B, C, T, H, W] -> float32 [B, N, C*t*h*w]; a single frame is repeated to fill a patch of several."""
    frames = size[0] if clips.shape[2] == 1 else -1
    return patchify(clips.float().expand(-1, -1, frames, -1, -1), size)
