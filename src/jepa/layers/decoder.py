"""The small decoder from tokens to pixels that autoencoder, VAE and MAE share, so that only their losses differ."""

from __future__ import annotations

from math import prod

import torch
from timm.layers.norm import LayerNorm
from torch import Tensor, nn

from jepa.layers.init import STD, init_weights
from jepa.layers.position import Positions
from jepa.layers.tokens import token_extent
from jepa.layers.transformer import check_sizes, make_blocks, run_blocks
from jepa.types import Encoder, PatchGrid


class PixelDecoder(nn.Module):
    """A transformer over all tokens of the grid (MAE, He et al. 2022, section 3).

    By default `width` is half the encoder's and `num_heads` the encoder's. Tokens that are not passed are replaced by
    mask tokens, a different one for each mask set.
    """

    def __init__(
        self, *, encoder: Encoder, input_dim: int, width: int | None, depth: int, num_heads: int | None,
        num_mask_tokens: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        width, num_heads = width or encoder.embed_dim // 2, num_heads or encoder.num_heads
        check_sizes(width, num_heads, 4.0, width_key="objective.decoder_width", heads_key="objective.decoder_num_heads")
        self.embed = nn.Linear(input_dim, width)
        self.mask_tokens = nn.Parameter(torch.empty(num_mask_tokens, width)) if num_mask_tokens else None
        self.positions = Positions(grid=encoder.grid, width=width)
        self.blocks = make_blocks(width, depth, num_heads, 4.0)
        self.norm = LayerNorm(width)
        self.project = nn.Linear(width, encoder.clip_shape[0] * prod(token_extent(encoder)))
        if self.mask_tokens is not None:
            nn.init.trunc_normal_(self.mask_tokens, std=STD)
        init_weights(self, self.blocks)

    def forward(self, tokens: Tensor, grid: PatchGrid, indices: Tensor | None = None, mask_set: int = 0) -> Tensor:
        """[B, N, input_dim], or [B, 1, input_dim] for all, or tokens at `indices` [B, K] only -> pixels [B, N, P]"""
        tokens = self.embed(tokens)
        if indices is None:
            tokens = tokens.expand(-1, grid.num_tokens, -1)
        else:
            assert self.mask_tokens is not None
            hidden = self.mask_tokens[mask_set].to(tokens.dtype).expand(len(tokens), grid.num_tokens, -1)
            tokens = hidden.scatter(1, indices[..., None].expand_as(tokens), tokens)
        tokens = self.positions.add(tokens, grid)
        return self.project(self.norm(run_blocks(self.blocks, tokens)))
