"""Vision Transformer on images (Dosovitskiy et al. 2021) that drops hidden tokens before it looks at them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Literal

from einops import rearrange
from timm.layers.norm import LayerNorm
from torch import Tensor, nn

from jepa.layers.attention import compute_dtype, same_group
from jepa.layers.init import init_weights
from jepa.layers.position import Positions
from jepa.layers.tokens import gather_tokens, grid_of, make_grid, patch_pair, patchify
from jepa.layers.transformer import check_sizes, make_blocks, run_blocks
from jepa.types import ClipShape, PatchGrid, Positive, PositiveInt, ShareBelowOne


class SpatialEncoder(nn.Module):
    """Every patch is a token with a fixed 2-D sin-cos position; there is no class token.

    The frames of a clip do not see each other, and there may be any number of them. A picture of another size that
    patches divide has the positions of its own grid, counted from the upper left corner: neighbours are as far apart as
    in `clip_shape`, and a smaller grid has no position that a larger one lacks. With `position=table` it has those of
    `clip_shape`, resampled.
    """

    num_prefix_tokens = 0

    def __init__(
        self,
        *,
        clip_shape: Sequence[int],
        patch_size: PositiveInt | Sequence[PositiveInt],
        embed_dim: PositiveInt,
        depth: PositiveInt,
        num_heads: PositiveInt,
        mlp_ratio: Positive = 4.0,
        drop_path: ShareBelowOne = 0.0,
        checkpoint_activations: bool = False,
        position: Annotated[str, Literal["sincos", "table"]] = "sincos",
        norm_eps: Positive = 1e-6,
    ) -> None:
        super().__init__()
        check_sizes(embed_dim, num_heads, mlp_ratio, width_key="encoder.embed_dim", heads_key="encoder.num_heads")
        channels, frames, height, width = clip_shape
        self.clip_shape: ClipShape = (channels, frames, height, width)
        self.patch_size = patch_height, patch_width = patch_pair(patch_size)
        self.frame_grid = make_grid((1, height, width), self.patch_size)
        self.grid: PatchGrid = replace(self.frame_grid, t=frames)
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.checkpoint_activations = checkpoint_activations

        self.embed = nn.Linear(channels * patch_height * patch_width, embed_dim)
        self.positions = Positions(
            grid=self.frame_grid,
            width=embed_dim,
            kind=position,
        )
        self.blocks = make_blocks(embed_dim, depth, num_heads, mlp_ratio, drop_path=drop_path, norm_eps=norm_eps)
        self.norm = LayerNorm(embed_dim, eps=norm_eps)
        init_weights(self, self.blocks)
        nn.init.xavier_uniform_(self.embed.weight)  # as in MAE: a patch speaks as loudly as its position

    def forward(self, clips: Tensor, keep: Tensor | None = None) -> Tensor:
        """[B, C, T, H, W] or [B, C, H, W] -> [B, N, D]; with `keep` [B, K] only those tokens: [B, K, D]."""
        grid = self.grid_of(clips)
        clips = clips if clips.ndim == 5 else clips[:, :, None]
        if keep is not None and grid.t > 1 and keep.shape[1] == grid.num_tokens:
            return gather_tokens(self(clips), keep)
        patches = patchify(clips, (1, *self.patch_size))
        if keep is None:
            return self._frames(patches, grid)
        frame_grid = replace(grid, t=1)
        frame, place = keep // frame_grid.num_tokens, keep % frame_grid.num_tokens
        tokens = self.positions.add(self.embed(gather_tokens(patches, keep)), frame_grid, place)
        mask = same_group(frame, compute_dtype(tokens)) if grid.t > 1 else None
        return self._trunk(tokens, mask)

    def _frames(self, patches: Tensor, grid: PatchGrid) -> Tensor:
        """[B, N, patch] -> [B, N, D], every frame a sample of its own"""
        patches = rearrange(patches, "b (t n) p -> (b t) n p", t=grid.t)
        tokens = self._trunk(self.positions.add(self.embed(patches), replace(grid, t=1)))
        return rearrange(tokens, "(b t) n d -> b (t n) d", t=grid.t)

    def _trunk(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.norm(run_blocks(self.blocks, tokens, mask=mask, checkpointed=self.checkpoint_activations))

    def grid_of(self, clips: Tensor) -> PatchGrid:
        return grid_of(clips, self.clip_shape[0], self.patch_size)
