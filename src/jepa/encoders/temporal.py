"""Vision Transformer on clips with joint attention over space and time (ViViT, Arnab et al. 2021, section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from timm.layers.norm import LayerNorm
from torch import Tensor, nn

from jepa.layers.init import init_weights
from jepa.layers.position import Positions
from jepa.layers.stems import embed_patches, make_stem
from jepa.layers.tokens import as_pair, grid_of, make_grid
from jepa.layers.transformer import check_sizes, make_blocks, run_blocks
from jepa.types import ClipShape, PatchGrid, Positive, PositiveInt, Share, ShareBelowOne, StemName


class TemporalEncoder(nn.Module):
    """Every tubelet, `tubelet_size` frames of one patch, is a token; clips may have any divisible size.

    A clip of one frame is an image, which is repeated to fill a tubelet.
    """

    num_prefix_tokens = 0

    def __init__(
        self, *, clip_shape: Sequence[int], patch_size: PositiveInt | Sequence[PositiveInt],
        tubelet_size: PositiveInt = 2, embed_dim: PositiveInt, depth: PositiveInt, num_heads: PositiveInt,
        mlp_ratio: Positive = 4.0, drop_path: ShareBelowOne = 0.0, checkpoint_activations: bool = False,
        position: Annotated[str, Literal["sincos", "rope", "vjepa2", "table"]] = "sincos", norm_eps: Positive = 1e-6,
        stem: StemName = "linear", stem_width: PositiveInt | None = None, stem_frozen: Share = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        check_sizes(embed_dim, num_heads, mlp_ratio, width_key="encoder.embed_dim", heads_key="encoder.num_heads")
        channels, frames, height, width = clip_shape
        self.clip_shape: ClipShape = (channels, frames, height, width)
        self.patch_size = as_pair(patch_size)
        self.tubelet_size = tubelet_size
        self.grid: PatchGrid = make_grid((frames, height, width), self.patch_size, tubelet_size)
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.checkpoint_activations = checkpoint_activations

        self.stem = make_stem(stem, channels * tubelet_size, self.patch_size, stem_width, embed_dim, stem_frozen)
        self.embed = nn.Linear(self.stem.width, embed_dim)
        self.positions = Positions(grid=self.grid, width=embed_dim, num_heads=num_heads, kind=position, in_time=True)
        self.blocks = make_blocks(embed_dim, depth, num_heads, mlp_ratio, drop_path=drop_path, norm_eps=norm_eps)
        self.norm = LayerNorm(embed_dim, eps=norm_eps)
        init_weights(self, self.blocks)
        nn.init.xavier_uniform_(self.embed.weight)  # as in MAE: patches and positions have similar norms

    def forward(self, clips: Tensor, keep: Tensor | None = None) -> Tensor:
        """[B, C, T, H, W] or [B, C, H, W] -> [B, N, D]; with `keep` [B, K] only those tokens: [B, K, D]."""
        grid = self.grid_of(clips)
        clips = clips if clips.ndim == 5 else clips[:, :, None]
        if clips.shape[2] == 1:
            clips = clips.expand(-1, -1, self.tubelet_size, -1, -1)
        patches = embed_patches(self.stem, clips, grid, self.tubelet_size, keep)
        tokens = self.positions.add(self.embed(patches), grid, keep)
        rope = self.positions.rope(tokens, grid, keep)
        return self.norm(run_blocks(self.blocks, tokens, rope=rope, checkpointed=self.checkpoint_activations))

    def grid_of(self, clips: Tensor) -> PatchGrid:
        return grid_of(clips, self.clip_shape[0], self.patch_size, self.tubelet_size)
