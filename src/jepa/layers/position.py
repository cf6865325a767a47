"""Fixed positions of tokens: sines and cosines that are added to them, or rotations for their attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from jepa.layers.attention import compute_dtype
from jepa.types import PatchGrid

ADDED = ("sincos", "table")
"""Kinds of positions that are added to the tokens; the others rotate queries and keys."""


def sincos(grid: PatchGrid, width: int, in_time: bool | None = None) -> Tensor:
    """-> float32 [N, width]: sines, then cosines, of time, row and column, each in a third of the width.

    Without time (`in_time=False`, and by default for one frame) row and column have half of it each: the positions of
    the Transformer (Vaswani et al. 2017, section 3.5) in two dimensions, as in MAE and I-JEPA. If three even parts do
    not fill the width, the rest is zero.
    """
    in_time = grid.t > 1 if in_time is None else in_time
    if not in_time and width % 4:
        raise ValueError(f"2-D sin-cos positions need a width divisible by 4, got {width}: change embed_dim or width")
    if in_time and width < 6:
        raise ValueError(f"3-D sin-cos positions need a width of at least 6, got {width}: change embed_dim or width")
    axes = coordinates(grid) if in_time else coordinates(grid)[1:]
    share = width // (2 * len(axes)) * 2
    encodings = torch.cat([waves(axis, share) for axis in axes], dim=1).float()
    return F.pad(encodings, (0, width - encodings.shape[1]))


def rope_table(grid: PatchGrid, head_dim: int, interleaved: bool = False) -> Tensor:
    """-> float32 [N, 2, head_dim]: cosines and signed sines that rotate pairs (2i, 2i + 1) of a query or key.

    Time, row and column rotate an equal even part of the head each, the rest stays: axial RoPE (RoFormer, Su et al.
    2021, section 3.2; V-JEPA 2, Assran et al. 2025, section 2). With `interleaved` the two of a pair have different
    frequencies, as in the training of the published V-JEPA 2 weights.
    """
    if head_dim % 2 or head_dim < 6:
        raise ValueError(
            f"rotary positions need an even width of each head, at least 6, got {head_dim}: "
            "change num_heads, or embed_dim or width"
        )
    half = head_dim // 6
    angles = [_angles(axis, half) for axis in coordinates(grid)]  # 3 of [N, half]
    angles = [a.repeat(1, 2) if interleaved else a.repeat_interleave(2, dim=1) for a in angles]
    angle = F.pad(torch.cat(angles, dim=1), (0, head_dim - 6 * half))  # [N, head_dim]
    sign = torch.tensor([-1.0, 1.0]).repeat(head_dim // 2)
    return torch.stack([angle.cos(), angle.sin() * sign], dim=1).float()


def coordinates(grid: PatchGrid) -> tuple[Tensor, Tensor, Tensor]:
    """-> time, row and column of each token, long [N]"""
    n = torch.arange(grid.num_tokens)
    return n // (grid.h * grid.w), n // grid.w % grid.h, n % grid.w


def waves(coordinate: Tensor, width: int) -> Tensor:
    """[N] -> float64 [N, width]: sines, then cosines, of wavelengths from 2 pi to 10000 * 2 pi."""
    angle = _angles(coordinate, width // 2)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def _angles(coordinate: Tensor, count: int) -> Tensor:
    """[N] -> float64 [N, count]"""
    frequency = 10000.0 ** -(torch.arange(count, dtype=torch.float64) / count)
    return coordinate.double()[:, None] * frequency


def resample(table: Tensor, old: PatchGrid, new: PatchGrid) -> Tensor:
    """[N, D] on the old grid -> [N, D] on the new one: bicubic in space, linear in time, as in published models."""
    maps = rearrange(table, "(t h w) d -> t d h w", t=old.t, h=old.h)
    if (old.h, old.w) != (new.h, new.w):
        maps = F.interpolate(maps, size=(new.h, new.w), mode="bicubic")
    lines = rearrange(maps, "t d h w -> 1 (d h w) t")
    if old.t != new.t:
        lines = F.interpolate(lines, size=new.t, mode="linear")
    return rearrange(lines, "1 (d h w) t -> (t h w) d", h=new.h, w=new.w)


def make_table(grid: PatchGrid, width: int, kind: str, in_time: bool, device: torch.device) -> Tensor:
    """-> float32 [N, width] for positions that are added, [N, 2, width] for rotary ones."""
    table = sincos(grid, width, in_time) if kind in ADDED else rope_table(grid, width, interleaved=kind == "vjepa2")
    return table.to(device)


class Positions(nn.Module):
    """Positions of the tokens of any grid; the table of `grid` is a buffer.

    `in_time` reserves a part of sin-cos positions for the time even if the grid has one step. With the kind "table" the
    positions of `grid` are stored with the weights, initially sin-cos and never trained, and resampled for other grids.
    """

    table: Tensor

    def __init__(
        self, *, grid: PatchGrid, width: int, num_heads: int = 1, kind: str = "sincos", in_time: bool = False
    ) -> None:
        super().__init__()
        self.grid = grid
        self.kind = kind
        self.width = width if kind in ADDED else width // num_heads
        self.in_time = in_time or grid.t > 1
        table, is_stored = self._table(grid, torch.device("cpu")), kind == "table"
        self.register_buffer("table", table.clone(), persistent=is_stored)  # a module of its own may change it

    def add(self, tokens: Tensor, grid: PatchGrid, indices: Tensor | None = None) -> Tensor:
        """Tokens [..., D], all or those at `indices` [...] -> tokens with positions added, unless these are rotary."""
        return tokens + self._rows(grid, indices) if self.kind in ADDED else tokens

    def rope(self, tokens: Tensor, grid: PatchGrid, indices: Tensor | None = None) -> Tensor | None:
        """[B, S, D] (, [B, S]) -> [2, B or 1, S, 1, 1, head_dim] in the dtype of the attention; None unless rotary."""
        if self.kind in ADDED:
            return None
        rows = self._rows(grid, indices).to(compute_dtype(tokens))
        rows = rows if rows.ndim == 4 else rows[None]  # [B or 1, S, 2, head_dim]
        return rows.movedim(2, 0)[..., None, None, :]

    def _rows(self, grid: PatchGrid, indices: Tensor | None) -> Tensor:
        if grid == self.grid:
            rows = self.table
        elif self.kind == "table":
            rows = resample(self.table, self.grid, grid)
        else:
            rows = self._table(grid, self.table.device).to(self.table.dtype)
        return rows if indices is None else rows[indices]

    def _table(self, grid: PatchGrid, device: torch.device) -> Tensor:
        return cached_table(make_table, grid, self.width, self.kind, self.in_time or grid.t > 1, device)


def cached_table(make: Callable[..., Tensor], *arguments) -> Tensor:
    """Cached `make(*arguments)`, made outside inference mode so that autograd may use it; not cached while tracing."""
    is_tracing = torch.compiler.is_compiling() or is_in_torch_dispatch_mode()  # tensors may be fake
    is_tracing = is_tracing or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    return make(*arguments) if is_tracing else _cached_table(make, *arguments)


@lru_cache(maxsize=64)
def _cached_table(make: Callable[..., Tensor], *arguments) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return make(*arguments)
