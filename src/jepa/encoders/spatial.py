"""Vision Transformer on images (Dosovitskiy et al. 2021) that drops hidden tokens before it looks at them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.layers.norm import LayerNorm
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from jepa.layers.init import init_weights
from jepa.layers.position import sincos
from jepa.layers.tokens import patchify, take
from jepa.layers.transformer import check_sizes, make_blocks
from jepa.types import ClipShape, PatchGrid


class SpatialEncoder(nn.Module):
    """Every patch is a token with a fixed 2-D sin-cos position; there is no class token."""

    positions: Tensor

    def __init__(
        self,
        *,
        clip_shape: Sequence[int],
        patch_size: int | Sequence[int],
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(
            width=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            width_key="encoder.embed_dim",
            heads_key="encoder.num_heads",
        )
        if not 0 <= drop_path < 1:
            raise ValueError(f"encoder.drop_path={drop_path} must lie in [0, 1)")
        channels, frames, height, width = clip_shape
        self.clip_shape: ClipShape = (channels, frames, height, width)
        self.patch_size = patch_height, patch_width = _pair(patch_size)
        self.grid: PatchGrid = _grid(self.clip_shape, self.patch_size)
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.checkpoint_activations = checkpoint_activations

        self.embed = nn.Linear(channels * patch_height * patch_width, embed_dim)
        self.register_buffer("positions", sincos(self.grid, embed_dim), persistent=False)  # follows from the sizes
        self.blocks = make_blocks(
            width=embed_dim, depth=depth, num_heads=num_heads, mlp_ratio=mlp_ratio, drop_path=drop_path
        )
        self.norm = LayerNorm(embed_dim)
        init_weights(self, self.blocks)
        nn.init.xavier_uniform_(self.embed.weight)  # as in MAE: a patch speaks as loudly as its position

    def forward(self, clips: Tensor, keep: Tensor | None = None) -> Tensor:
        """[B, C, T, H, W] or [B, C, H, W] -> [B, N, D]; with `keep` [B, K] only those tokens: [B, K, D]."""
        if clips.ndim == 4:
            clips = clips[:, :, None]
        if tuple(clips.shape[1:]) != self.clip_shape:
            raise ValueError(
                f"this encoder reads clips of (channels, frames, height, width) {self.clip_shape}, "
                f"got {tuple(clips.shape[1:])}: resize the pictures (`load_encoder(...).transform` does)"
            )
        patches = patchify(clips, (1, *self.patch_size))
        if keep is None:
            tokens = self.embed(patches) + self.positions
        else:
            tokens = self.embed(take(patches, keep)) + self.positions[keep]
        for block in self.blocks:
            if self.checkpoint_activations and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, use_reentrant=False)
            else:
                tokens = block(tokens)
        return self.norm(tokens)


def _pair(patch_size: int | Sequence[int]) -> tuple[int, int]:
    height, width = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    if min(height, width) < 1:
        raise ValueError(f"encoder.patch_size={patch_size} must be at least 1")
    return height, width


def _grid(clip_shape: ClipShape, patch_size: tuple[int, int]) -> PatchGrid:
    _, frames, *image_size = clip_shape
    if frames != 1:
        raise ValueError(f"encoder=spatial reads single images, got num_frames={frames}: set num_frames=1")
    for name, pixels, patch in zip(("height", "width"), image_size, patch_size, strict=True):
        if pixels % patch:
            raise ValueError(
                f"image {name} {pixels} is not divisible by the patch's {patch}: "
                "change image_size or encoder.patch_size"
            )
    return PatchGrid(1, image_size[0] // patch_size[0], image_size[1] // patch_size[1])
