"""The pixels themselves as tokens: the baseline of an encoder that has no weights."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from jepa.layers.tokens import as_pair, gather_tokens, grid_of, make_grid, patchify
from jepa.types import ClipShape, PatchGrid, PositiveInt


class PixelEncoder(nn.Module):
    """The normalised pixels of every patch of every frame are a token; nothing is learnt and nothing is lost."""

    num_prefix_tokens = 0
    num_heads = 1
    rules = ("jepa.objectives.rules.pixels",)

    def __init__(self, *, clip_shape: Sequence[int], patch_size: PositiveInt | Sequence[PositiveInt]) -> None:
        super().__init__()
        channels, frames, height, width = clip_shape
        self.clip_shape: ClipShape = (channels, frames, height, width)
        self.patch_size = as_pair(patch_size)
        self.grid: PatchGrid = make_grid((frames, height, width), self.patch_size)
        self.embed_dim = channels * self.patch_size[0] * self.patch_size[1]
        self.blocks = nn.ModuleList()

    def forward(self, clips: Tensor, keep: Tensor | None = None) -> Tensor:
        """[B, C, T, H, W] or [B, C, H, W] -> [B, N, D]; with `keep` [B, K] only those tokens: [B, K, D]."""
        self.grid_of(clips)  # refuses other channels and sizes without a grid
        tokens = patchify(clips if clips.ndim == 5 else clips[:, :, None], (1, *self.patch_size))
        return tokens if keep is None else gather_tokens(tokens, keep)

    def grid_of(self, clips: Tensor) -> PatchGrid:
        return grid_of(clips, self.clip_shape[0], self.patch_size)
