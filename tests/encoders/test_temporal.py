"""The temporal encoder: tubelets of clips and images of any size, and their positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checked import checked
from torch import Tensor

from jepa.encoders.spatial import SpatialEncoder
from jepa.encoders.temporal import TemporalEncoder
from jepa.layers.position import sincos
from jepa.types import PatchGrid

SIZES: dict[str, Any] = {"clip_shape": (3, 4, 16, 24), "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
POSITIONS = pytest.mark.parametrize("position", ["sincos", "rope", "vjepa2"])


def make_encoder(**changes: Any) -> TemporalEncoder:
    torch.manual_seed(0)
    return checked(TemporalEncoder, **(SIZES | changes))


def random_clips(*shape: int) -> Tensor:
    return torch.randn(2, *(shape or SIZES["clip_shape"]), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("clip_shape", "patch_size", "tubelet_size", "grid"),
    [
        ((3, 4, 16, 24), 8, 2, PatchGrid(2, 2, 3)),
        ([1, 6, 24, 12], [8, 4], 3, PatchGrid(2, 3, 3)),
        ((4, 5, 8, 8), (8, 8), 1, PatchGrid(5, 1, 1)),
        ((3, 1, 16, 24), 8, 2, PatchGrid(1, 2, 3)),
    ],
)
@POSITIONS
def test_the_clip_and_the_tubelet_decide_the_grid(
    clip_shape: Any, patch_size: Any, tubelet_size: int, grid: PatchGrid, position: str
) -> None:
    encoder = make_encoder(clip_shape=clip_shape, patch_size=patch_size, tubelet_size=tubelet_size, position=position)
    clips = random_clips(*clip_shape)
    assert (encoder.grid, encoder.clip_shape, encoder.grid_of(clips)) == (grid, tuple(clip_shape), grid)
    assert encoder(clips).shape == (2, grid.num_tokens, 24)


def test_embedding_of_tubelets_is_a_convolution_in_time_and_space() -> None:
    encoder = make_encoder(depth=1)
    seen: list[Tensor] = []
    encoder.blocks[0].register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    clips = random_clips()
    encoder(clips)
    weight = encoder.embed.weight.unflatten(1, (3, 2, 8, 8))
    convolved = F.conv3d(clips, weight, encoder.embed.bias, stride=(2, 8, 8)).flatten(2).mT
    torch.testing.assert_close(seen[0], convolved + sincos(encoder.grid, 24), rtol=1e-5, atol=1e-5)


@POSITIONS
@pytest.mark.parametrize("shape", [(3, 4, 16, 24), (3, 8, 24, 8), (3, 2, 8, 40)])
def test_clips_of_any_divisible_size_are_read_as_by_an_encoder_built_for_them(position: str, shape: tuple) -> None:
    encoder, other = make_encoder(position=position), make_encoder(position=position, clip_shape=shape)
    clips = random_clips(*shape)
    assert encoder.grid_of(clips) == other.grid
    assert encoder(clips).equal(other(clips))
    keep = torch.tensor([[0, 2], [1, 3]])
    assert encoder(clips, keep=keep).equal(other(clips, keep=keep))


@POSITIONS
def test_an_image_is_a_clip_whose_frame_fills_a_tubelet(position: str) -> None:
    encoder = make_encoder(position=position)
    image = random_clips(3, 1, 16, 24)
    assert encoder.grid_of(image) == encoder.grid_of(image[:, :, 0]) == PatchGrid(1, 2, 3)
    assert encoder(image).equal(encoder(image.repeat(1, 1, 2, 1, 1)))
    assert encoder(image[:, :, 0]).equal(encoder(image))


@POSITIONS
def test_an_image_has_the_positions_of_the_first_step_of_a_clip(position: str) -> None:
    of_images, of_clips = make_encoder(position=position, clip_shape=(3, 1, 16, 24)), make_encoder(position=position)
    image = random_clips(3, 1, 16, 24)
    assert of_images(image).equal(of_clips(image))


def test_without_time_and_positions_it_equals_the_spatial_encoder() -> None:
    """One frame per tubelet and no rotation: blocks, patches and initial weights are the same."""
    encoder = make_encoder(clip_shape=(3, 1, 16, 24), tubelet_size=1, position="rope")
    torch.manual_seed(0)
    sizes = {name: value for name, value in SIZES.items() if name != "clip_shape"}
    spatial = SpatialEncoder(clip_shape=(3, 1, 16, 24), **sizes)
    assert all(torch.equal(a, b) for a, b in zip(encoder.parameters(), spatial.parameters(), strict=True))
    encoder.positions.table.copy_(torch.tensor([1.0, 0.0])[:, None])
    spatial.positions.table.zero_()
    image = random_clips(3, 1, 16, 24)
    torch.testing.assert_close(encoder(image), spatial(image))


@POSITIONS
def test_keeping_every_token_changes_nothing_and_order_is_kept(position: str) -> None:
    encoder, clips = make_encoder(position=position), random_clips()
    torch.testing.assert_close(encoder(clips, keep=torch.arange(12).expand(2, 12)), encoder(clips))
    keep = torch.tensor([[0, 2, 7, 11], [1, 3, 4, 8]])
    torch.testing.assert_close(encoder(clips, keep=keep.flip(1)), encoder(clips, keep=keep).flip(1))


@POSITIONS
def test_tokens_depend_on_the_kept_patches_of_all_times_and_on_no_others(position: str) -> None:
    encoder, clips = make_encoder(position=position), random_clips().requires_grad_()
    encoder(clips, keep=torch.tensor([[0, 10], [1, 5]]))[:, 0].sin().sum().backward()
    assert clips.grad is not None
    patches = clips.grad.unflatten(2, (2, 2)).unflatten(4, (2, 8)).unflatten(6, (3, 8))
    touched = patches.abs().sum(dim=(1, 3, 5, 7)).flatten(1) > 0
    assert touched.tolist() == [[n in (0, 10) for n in range(12)], [n in (1, 5) for n in range(12)]]


@POSITIONS
def test_the_order_of_frames_matters(position: str) -> None:
    encoder, clips = make_encoder(position=position), random_clips(3, 8, 16, 24)
    shuffled = clips.unflatten(2, (4, 2))[:, :, [2, 0, 3, 1]].flatten(2, 3)  # tubelets stay whole
    permuted = encoder(clips).unflatten(1, (4, 6))[:, [2, 0, 3, 1]]
    assert (encoder(shuffled).unflatten(1, (4, 6)) - permuted).abs().max() > 1e-2


@pytest.mark.parametrize("position", ["sincos", "rope"])
def test_activation_checkpointing_changes_no_output_and_no_gradient(position: str) -> None:
    results = []
    for checkpointed in (False, True):
        encoder = make_encoder(checkpoint_activations=checkpointed, drop_path=0.5, position=position)
        torch.manual_seed(1)
        output = encoder(random_clips())
        output.square().sum().backward()
        results.append([output, *(parameter.grad for parameter in encoder.parameters())])
    torch.testing.assert_close(results[0], results[1])


@POSITIONS
def test_positions_are_neither_learnt_nor_stored(position: str) -> None:
    encoder = make_encoder(position=position)
    assert set(encoder.state_dict()) == {name for name, _ in encoder.named_parameters()}
    assert encoder.positions.table.dtype == torch.float32
    assert set(encoder.state_dict()) == set(make_encoder(clip_shape=(3, 8, 32, 32)).state_dict())


def test_rotary_tables_are_computed_once_and_shared_by_all_blocks() -> None:
    encoder, seen = make_encoder(position="rope", depth=3), []
    for block in encoder.blocks:
        block.register_forward_pre_hook(lambda _block, _inputs, options: seen.append(options["rope"]), with_kwargs=True)
    encoder(random_clips(3, 6, 16, 8), keep=torch.tensor([[0, 3], [1, 5]]))
    assert len(seen) == 3
    assert all(rope is seen[0] for rope in seen)


@POSITIONS
def test_a_size_first_seen_in_inference_mode_can_be_trained_on(position: str) -> None:
    encoder, clips = make_encoder(position=position), random_clips(3, 10, 8, 8)
    with torch.inference_mode():
        encoder(clips)
    encoder(clips).sum().backward()
    assert encoder.embed.weight.grad is not None


@pytest.mark.parametrize("position", ["sincos", "rope"])
def test_the_blocks_run_in_the_dtype_of_autocast(position: str) -> None:
    encoder, clips = make_encoder(position=position), random_clips()
    with torch.autocast("cpu", torch.bfloat16):
        low = encoder(clips)
    torch.testing.assert_close(low.float(), encoder(clips), rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip_shape": (3, 7, 16, 24)}, r"num_frames 7 .*encoder.tubelet_size \(nearest: 6 and 8\)"),
        ({"clip_shape": (3, 4, 20, 24)}, r"height 20 is not divisible by the patch's 8: .*\(nearest: 16 and 24\)"),
        ({"clip_shape": (3, 4, 16, 4)}, r"width 4 .* change image_size or encoder.patch_size \(nearest: 8\)"),
        ({"tubelet_size": 0}, "tubelet_size=0"),
        ({"patch_size": 0}, "patch_size=0"),
        ({"position": "alibi"}, "position=alibi: no such position; valid: sincos, rope, vjepa2"),
        ({"position": "rope", "num_heads": 6}, "at least 6, got 4"),
        ({"num_heads": 5}, "encoder.embed_dim=24 is not divisible by encoder.num_heads=5"),
        ({"drop_path": 1.0}, "drop_path=1.0"),
    ],
)
def test_refuses_sizes_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_encoder(**changes)


@pytest.mark.parametrize(
    ("shape", "message"),
    [((3, 5, 16, 24), "num_frames 5"), ((3, 4, 16, 20), "image width 20"), ((1, 4, 16, 24), "3 channels")],
)
def test_refuses_clips_that_do_not_fit_the_patches(shape: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_encoder()(random_clips(*shape))
