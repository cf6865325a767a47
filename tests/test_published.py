"""Weights of others: names that go both ways, files that are read or refused, and the same function afterwards."""

from __future__ import annotations

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from jepa.encoders.spatial import SpatialEncoder
from jepa.encoders.temporal import TemporalEncoder
from jepa.renames import IJEPA, PUBLISHED, TABLE, VJEPA2, from_foreign, to_foreign

IMAGE = {"clip_shape": (3, 1, 16, 24), "patch_size": (8, 4), "embed_dim": 24, "depth": 3, "num_heads": 2}
CLIP = {"clip_shape": (3, 4, 16, 24), "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}


def tensors_of(encoder) -> dict[str, torch.Tensor]:
    return encoder.state_dict() | {TABLE: encoder.positions.table}


@pytest.mark.parametrize(
    ("names", "encoder", "patch"),
    [
        (PUBLISHED, SpatialEncoder(**IMAGE), (3, 8, 4)),
        (PUBLISHED, TemporalEncoder(**CLIP), (3, 2, 8, 8)),
        (IJEPA, SpatialEncoder(**IMAGE), (3, 8, 4)),
        (VJEPA2, TemporalEncoder(**CLIP), (3, 2, 8, 8)),
    ],
    ids=["published-image", "published-clip", "ijepa", "vjepa2"],
)
def test_what_is_renamed_for_others_is_renamed_back(names, encoder, patch) -> None:
    ours = tensors_of(encoder)
    theirs = to_foreign(ours, names, patch)
    back = from_foreign(theirs | {"head.weight": torch.ones(1)}, names)
    assert back.keys() == ours.keys() - ({TABLE} if names is VJEPA2 else set())
    assert all(torch.equal(tensor, ours[name]) for name, tensor in back.items())


def test_published_names_are_those_of_timm() -> None:
    encoder = SpatialEncoder(**IMAGE).eval()
    vit = VisionTransformer(
        img_size=(16, 24), patch_size=(8, 4), embed_dim=24, depth=3, num_heads=2,
        num_classes=0, class_token=False, global_pool="",
    ).eval()  # fmt: skip
    vit.load_state_dict(to_foreign(tensors_of(encoder), PUBLISHED, (3, 8, 4)))
    images = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(encoder(images), vit.forward_features(images))


def test_a_tensor_that_is_lacking_is_named() -> None:
    theirs = to_foreign(tensors_of(SpatialEncoder(**IMAGE)), IJEPA, (3, 8, 4))
    del theirs["encoder.layer.1.attention.attention.key.bias"]
    with pytest.raises(KeyError, match=r"encoder\.layer\.1\.attention\.attention\.key\.bias"):
        from_foreign(theirs, IJEPA)
