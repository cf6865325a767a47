"""Pixels as tokens: nothing is lost, nothing is learnt."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from jepa.data.transforms import EvalTransform
from jepa.encoders.pixels import PixelEncoder
from jepa.encoders.pretrained import open_encoder, pretrained_encoder
from jepa.encoders.published import write_encoder
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


def test_pixels_are_opened_and_cannot_be_trained_further(tmp_path: Path) -> None:
    encoder = PixelEncoder(clip_shape=(1, 2, 8, 8), patch_size=4)
    encoder.transform = EvalTransform(image_size=(8, 8), mean=[0.5], std=[0.25])
    encoder.node = {"_target_": "jepa.encoders.pixels.PixelEncoder", "clip_shape": [1, 2, 8, 8], "patch_size": 4}
    write_encoder(tmp_path, encoder)
    clips = torch.randn(2, 1, 2, 8, 8)
    assert torch.equal(open_encoder(tmp_path)(clips), encoder(clips))
    with pytest.raises(ValueError, match="no weights to train further: its tokens are the pixels"):
        pretrained_encoder(clip_shape=(1, 2, 8, 8), weights=str(tmp_path))
