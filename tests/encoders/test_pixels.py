"""Pixels as tokens: nothing is lost, nothing is learnt."""

from __future__ import annotations

import torch

from jepa.encoders.pixels import PixelEncoder
from jepa.layers.tokens import unpatchify


def test_tokens_are_the_pixels_of_every_frame() -> None:
    clips = torch.randn(2, 3, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    encoder = PixelEncoder(clip_shape=(3, 4, 8, 12), patch_size=(4, 6))
    tokens = encoder(clips)
    assert tokens.shape == (2, encoder.grid.num_tokens, encoder.embed_dim)
    assert torch.equal(unpatchify(tokens, encoder.grid, (1, 4, 6)), clips)
    assert torch.equal(encoder(clips[:, :, 0]), tokens[:, : encoder.grid.num_tokens // 4])
    assert torch.equal(encoder(clips, torch.tensor([[3, 0], [1, 1]]))[0], tokens[0, [3, 0]])
    assert not list(encoder.parameters())
