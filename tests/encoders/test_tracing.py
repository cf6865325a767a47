"""Encoders as TorchScript."""

from functools import partial
from typing import Any

import pytest
import torch

from jepa.encoders.pretrained import TimmEncoder
from jepa.encoders.spatial import SpatialEncoder
from jepa.encoders.temporal import TemporalEncoder

SIZES: dict[str, Any] = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
ENCODERS = {
    "spatial": partial(SpatialEncoder, clip_shape=(3, 1, 16, 24), **SIZES),
    "spatial on clips": partial(SpatialEncoder, clip_shape=(3, 4, 16, 24), **SIZES),
    "timm": partial(TimmEncoder, clip_shape=(3, 1, 32, 32), architecture="vit_tiny_patch16_224"),
} | {
    f"temporal, {position}": partial(TemporalEncoder, clip_shape=(3, 4, 16, 24), position=position, **SIZES)
    for position in ("sincos", "rope", "vjepa2", "table")
}


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("has_time", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_a_traced_encoder_gives_the_same_tokens_for_any_batch(name, has_time):
    torch.manual_seed(0)
    encoder = ENCODERS[name]().eval()
    clips = torch.randn(3, *encoder.clip_shape)
    clips = clips if has_time else clips[:, :, 0]
    traced = torch.jit.trace(encoder, clips[:2])
    torch.testing.assert_close(traced(clips), encoder(clips))
