"""Vision Transformer on images (Dosovitskiy et al. 2021) that drops hidden tokens before its first block."""

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
from jepa.layers.stems import embed_patches, make_stem
from jepa.layers.tokens import as_pair, gather_tokens, grid_of, make_grid
from jepa.layers.transformer import check_sizes, make_blocks, run_blocks
from jepa.types import ClipShape, NonNegativeInt, PatchGrid, Positive, PositiveInt, Share, ShareBelowOne, StemName


class SpatialEncoder(nn.Module):
    """Every patch is a token with a fixed 2-D sin-cos position; there is no class token.

    The frames of a clip, of which there may be any number, do not attend to each other. The positions of an image of
    another size count its rows and columns from the upper left corner, so that a smaller grid has a part of those of a
    larger one. With `position=table` they are those of `clip_shape`, resampled. With `depth=0` tokens are embedded
    patches that know nothing of each other, for a predictor or probe that reads all of them.
    """

    num_prefix_tokens = 0
    tubelet_size = 1

    def __init__(
        self, *, clip_shape: Sequence[int], patch_size: PositiveInt | Sequence[PositiveInt], embed_dim: PositiveInt,
        depth: NonNegativeInt, num_heads: PositiveInt, mlp_ratio: Positive = 4.0, drop_path: ShareBelowOne = 0.0,
        checkpoint_activations: bool = False, position: Annotated[str, Literal["sincos", "table"]] = "sincos",
        norm_eps: Positive = 1e-6, stem: StemName = "linear", stem_width: PositiveInt | None = None,
        stem_frozen: Share = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        check_sizes(embed_dim, num_heads, mlp_ratio, width_key="encoder.embed_dim", heads_key="encoder.num_heads")
        channels, frames, height, width = clip_shape
        self.clip_shape: ClipShape = (channels, frames, height, width)
        self.patch_size = as_pair(patch_size)
        self.frame_grid = make_grid((1, height, width), self.patch_size)
        self.grid: PatchGrid = replace(self.frame_grid, t=frames)
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.checkpoint_activations = checkpoint_activations

        self.stem = make_stem(stem, channels, self.patch_size, stem_width, embed_dim, stem_frozen)
        self.embed = nn.Linear(self.stem.width, embed_dim)
        self.positions = Positions(grid=self.frame_grid, width=embed_dim, kind=position)
        self.blocks = make_blocks(embed_dim, depth, num_heads, mlp_ratio, drop_path=drop_path, norm_eps=norm_eps)
        self.norm = LayerNorm(embed_dim, eps=norm_eps)
        init_weights(self, self.blocks)
        nn.init.xavier_uniform_(self.embed.weight)  # as in MAE: patches and positions have similar norms

    def forward(self, clips: Tensor, keep: Tensor | None = None) -> Tensor:
        """[B, C, T, H, W] or [B, C, H, W] -> [B, N, D]; with `keep` [B, K] only those tokens: [B, K, D]."""
        grid = self.grid_of(clips)
        clips = clips if clips.ndim == 5 else clips[:, :, None]
        if keep is not None and grid.t > 1 and keep.shape[1] == grid.num_tokens:
            return gather_tokens(self(clips), keep)
        patches = embed_patches(self.stem, clips, grid, self.tubelet_size, keep)
        if keep is None:
            return self._frames(patches, grid)
        frame_grid = replace(grid, t=1)
        frame, patch = keep // frame_grid.num_tokens, keep % frame_grid.num_tokens
        tokens = self.positions.add(self.embed(patches), frame_grid, patch)
        mask = same_group(frame, compute_dtype(tokens)) if grid.t > 1 else None
        return self._trunk(tokens, mask)

    def _frames(self, patches: Tensor, grid: PatchGrid) -> Tensor:
        """[B, N, P] -> [B, N, D]; each frame is a sample"""
        patches = rearrange(patches, "b (t n) p -> (b t) n p", t=grid.t)
        tokens = self._trunk(self.positions.add(self.embed(patches), replace(grid, t=1)))
        return rearrange(tokens, "(b t) n d -> b (t n) d", t=grid.t)

    def _trunk(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.norm(run_blocks(self.blocks, tokens, mask=mask, checkpointed=self.checkpoint_activations))

    def grid_of(self, clips: Tensor) -> PatchGrid:
        return grid_of(clips, self.clip_shape[0], self.patch_size)
