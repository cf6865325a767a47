"""The spatial encoder: tokens are dropped before the trunk, sizes follow from the clip, weights start as stated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checked import checked
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from jepa.encoders.spatial import SpatialEncoder
from jepa.types import PatchGrid

SIZES: dict[str, Any] = {"clip_shape": (3, 1, 16, 24), "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}


def make_encoder(**changes: Any) -> SpatialEncoder:
    torch.manual_seed(0)
    return checked(SpatialEncoder, **(SIZES | changes))


def random_clips(encoder: SpatialEncoder, batch_size: int = 2) -> Tensor:
    return torch.randn(batch_size, *encoder.clip_shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("clip_shape", "patch_size", "grid"),
    [
        ((3, 1, 32, 32), 8, PatchGrid(1, 4, 4)),
        ((1, 1, 16, 48), 8, PatchGrid(1, 2, 6)),
        ((7, 1, 24, 12), [8, 4], PatchGrid(1, 3, 3)),
        ([4, 1, 6, 6], (6, 6), PatchGrid(1, 1, 1)),
        ((3, 5, 16, 24), 8, PatchGrid(5, 2, 3)),
    ],
)
def test_the_clip_and_the_patch_decide_the_grid(clip_shape: Any, patch_size: Any, grid: PatchGrid) -> None:
    encoder = make_encoder(clip_shape=clip_shape, patch_size=patch_size)
    assert (encoder.grid, encoder.clip_shape) == (grid, tuple(clip_shape))
    assert encoder(random_clips(encoder)).shape == (2, grid.num_tokens, 16)


def test_without_blocks_a_token_depends_on_its_own_patch_alone() -> None:
    encoder = make_encoder(depth=0).eval()
    clips = random_clips(encoder)
    changed = clips.clone()
    changed[..., :8, 8:16] += 1  # the second patch of the first row
    differs = (encoder(clips) != encoder(changed)).any(dim=(0, 2))
    assert differs.tolist() == [False, True, False, False, False, False]


def test_without_class_token_and_with_the_same_weights_it_is_timms_vision_transformer() -> None:
    encoder = make_encoder().eval()
    timm_encoder = VisionTransformer(
        img_size=(16, 24),
        patch_size=8,
        embed_dim=16,
        depth=3,
        num_heads=2,
        num_classes=0,
        class_token=False,
        global_pool="",
    ).eval()
    weights = encoder.state_dict()
    weights["patch_embed.proj.weight"] = weights.pop("embed.weight").unflatten(1, (3, 8, 8))
    weights["patch_embed.proj.bias"] = weights.pop("embed.bias")
    weights["pos_embed"] = encoder.positions.table[None]
    timm_encoder.load_state_dict(weights)
    clips = random_clips(encoder)
    torch.testing.assert_close(encoder(clips), timm_encoder(clips[:, :, 0]), rtol=1e-5, atol=1e-5)


def test_keeping_every_token_changes_nothing() -> None:
    encoder = make_encoder()
    clips = random_clips(encoder)
    torch.testing.assert_close(encoder(clips, keep=torch.arange(6).expand(2, 6)), encoder(clips))


def test_kept_tokens_come_in_the_order_of_their_indices() -> None:
    encoder = make_encoder()
    clips, keep = random_clips(encoder), torch.tensor([[0, 2, 5], [1, 3, 4]])
    torch.testing.assert_close(encoder(clips, keep=keep.flip(1)), encoder(clips, keep=keep).flip(1))


def test_hidden_pixels_cannot_reach_the_tokens() -> None:
    encoder = make_encoder()
    clips = random_clips(encoder).requires_grad_()
    encoder(clips, keep=torch.tensor([[0, 4], [1, 5]])).square().sum().backward()
    assert clips.grad is not None
    touched = clips.grad.abs().sum(dim=(1, 2)).unflatten(1, (2, 8)).unflatten(3, (3, 8)).sum(dim=(2, 4)).flatten(1) > 0
    assert touched.tolist() == [[n in (0, 4) for n in range(6)], [n in (1, 5) for n in range(6)]]


def test_the_trunk_computes_only_kept_tokens() -> None:
    encoder = make_encoder()
    shapes: list[torch.Size] = []
    for layer in (encoder.embed, encoder.blocks[0]):
        layer.register_forward_hook(lambda _module, inputs, _output: shapes.append(inputs[0].shape))
    encoder(random_clips(encoder), keep=torch.zeros(2, 4, dtype=torch.long))
    assert [shape[1] for shape in shapes] == [4, 4]


def test_an_image_is_a_clip_of_one_frame() -> None:
    encoder = make_encoder()
    clips = random_clips(encoder)
    assert encoder(clips[:, :, 0]).equal(encoder(clips))


def test_positions_are_neither_learnt_nor_stored() -> None:
    encoder = make_encoder()
    names = {name for name, _ in encoder.named_parameters()}
    assert not any("position" in name for name in names)
    assert set(encoder.state_dict()) == names
    assert encoder.positions.table.dtype == torch.float32


def test_initial_residual_outputs_are_scaled_down_with_depth() -> None:
    encoder = make_encoder(embed_dim=128, depth=4)
    for number, block in enumerate(encoder.blocks, start=1):
        for name, scale in {"attn.qkv": 1.0, "mlp.fc1": 1.0, "attn.proj": 2 * number, "mlp.fc2": 2 * number}.items():
            weight = block.get_parameter(f"{name}.weight")
            expected = 0.6 / (weight.shape[1] * scale) ** 0.5
            assert weight.std().item() == pytest.approx(expected, rel=0.05), (number, name)
            assert not block.get_parameter(f"{name}.bias").any()


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_activation_checkpointing_changes_no_output_and_no_gradient(drop_path: float) -> None:
    results = []
    for checkpointed in (False, True):
        encoder = make_encoder(checkpoint_activations=checkpointed, drop_path=drop_path)
        torch.manual_seed(1)
        output = encoder(random_clips(encoder))
        output.square().sum().backward()
        results.append([output, *(parameter.grad for parameter in encoder.parameters())])
    torch.testing.assert_close(results[0], results[1])


def test_activation_checkpointing_computes_each_block_again_in_the_backward() -> None:
    encoder, calls = make_encoder(checkpoint_activations=True), []
    encoder.blocks[1].get_submodule("norm1").register_forward_hook(lambda *_: calls.append(1))
    encoder(random_clips(encoder)).sum().backward()
    assert len(calls) == 2


def test_drop_path_acts_in_training_alone() -> None:
    encoder = make_encoder(drop_path=0.9)
    clips = random_clips(encoder, batch_size=8)
    assert not encoder(clips).equal(encoder(clips))
    encoder.eval()
    assert encoder(clips).equal(encoder(clips))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"clip_shape": (3, 1, 20, 24)},
            "height 20 is not divisible by the patch's 8: .*image_size or encoder.patch_size",
        ),
        ({"clip_shape": (3, 1, 16, 25)}, "width 25"),
        ({"num_heads": 3}, r"encoder.embed_dim=16 is not divisible by encoder.num_heads=3"),
        ({"num_heads": 0}, "num_heads=0"),
        ({"embed_dim": 18}, "divisible by 4, got 18"),
        ({"depth": -1}, "depth=-1"),
        ({"patch_size": 0}, "patch_size=0"),
        ({"mlp_ratio": 0.0}, "mlp_ratio=0.0"),
        ({"drop_path": 1.0}, "drop_path=1.0"),
    ],
)
def test_refuses_sizes_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_encoder(**changes)


def test_refuses_clips_that_patches_do_not_divide_or_of_other_channels() -> None:
    with pytest.raises(ValueError, match="image height 20 is not divisible by the patch's 8"):
        make_encoder()(torch.zeros(1, 3, 20, 24))
    with pytest.raises(ValueError, match=r"takes 3 channels, got clips of \(1, 24, 24\)"):
        make_encoder()(torch.zeros(1, 1, 24, 24))


def test_a_picture_of_another_size_has_the_positions_of_its_own_grid() -> None:
    """The reference is an encoder built for that size with the same weights."""
    encoder = make_encoder()
    other = make_encoder(clip_shape=(3, 1, 32, 8))
    other.load_state_dict(encoder.state_dict())
    clips = random_clips(other)
    assert encoder.grid_of(clips) == other.grid == PatchGrid(1, 4, 1)
    torch.testing.assert_close(encoder(clips), other(clips))
    keep = torch.tensor([[0, 3], [1, 2]])
    torch.testing.assert_close(encoder(clips, keep=keep), other(clips, keep=keep))


def test_weights_start_as_usual_at_the_usual_width() -> None:
    block = make_encoder(embed_dim=768, depth=1, num_heads=12).blocks[0]
    assert block.get_parameter("attn.qkv.weight").std().item() == pytest.approx(0.02, rel=0.1)


def test_the_frames_of_a_clip_are_encoded_one_by_one() -> None:
    encoder = make_encoder(clip_shape=(3, 4, 16, 24))
    clips = random_clips(encoder)
    frames = torch.cat([encoder(clips[:, :, t]) for t in range(4)], dim=1)
    torch.testing.assert_close(encoder(clips), frames)
    torch.testing.assert_close(encoder(clips, keep=torch.arange(24).flip(0).expand(2, 24)), frames.flip(1))


def test_kept_tokens_attend_to_the_kept_tokens_of_their_own_frame() -> None:
    encoder = make_encoder(clip_shape=(3, 3, 16, 24))
    clips = random_clips(encoder)
    keep = torch.tensor([[0, 2, 5, 6, 8, 12], [1, 7, 9, 10, 11, 17]])  # 6 tokens a frame
    tokens = encoder(clips, keep=keep)
    for b in range(2):
        for t in range(3):
            chosen = keep[b] // 6 == t
            alone = encoder(clips[b : b + 1, :, t], keep=keep[b : b + 1, chosen] % 6)
            torch.testing.assert_close(tokens[b : b + 1, chosen], alone)


def test_frames_may_be_of_any_number() -> None:
    encoder = make_encoder()
    clips = torch.randn(2, 3, 5, 16, 24, generator=torch.Generator().manual_seed(0))
    assert encoder.grid_of(clips) == PatchGrid(5, 2, 3)
    assert encoder.grid_of(clips[:, :, 0]) == encoder.grid == PatchGrid(1, 2, 3)
    torch.testing.assert_close(encoder(clips)[:, 12:18], encoder(clips[:, :, 2]))
