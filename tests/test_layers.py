"""Tokens, positions, initial weights and attention: the parts that encoder and predictor share."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa.layers.attention import CrossAttentionBlock, block_bias, cached_block_bias, choose_attention
from jepa.layers.position import sincos
from jepa.layers.tokens import patchify, take
from jepa.layers.transformer import make_blocks
from jepa.types import PatchGrid

CPU = torch.device("cpu")


@pytest.mark.parametrize("shape", [(5,), (2, 3), (1, 1)])
def test_take_gives_each_sample_the_tokens_at_its_own_indices(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(3, 7, 4, generator=generator)
    indices = torch.randint(7, (3, *shape), generator=generator)
    assert take(tokens, indices).equal(torch.stack([tokens[b][indices[b]] for b in range(3)]))


def test_take_sends_gradients_back_to_the_tokens_it_took() -> None:
    tokens = torch.zeros(1, 4, 2, requires_grad=True)
    take(tokens, torch.tensor([[[1, 3], [3, 3]]])).sum().backward()
    assert tokens.grad is not None
    assert tokens.grad[0, :, 0].tolist() == [0, 1, 0, 3]


def test_a_patch_holds_the_pixels_at_its_place_in_the_grid() -> None:
    grid = PatchGrid(2, 3, 4)
    clips = torch.randn(2, 3, 2 * 2, 3 * 4, 4 * 5, generator=torch.Generator().manual_seed(0))
    patches = patchify(clips, (2, 4, 5))
    assert patches.shape == (2, grid.num_tokens, 3 * 2 * 4 * 5)
    for n in range(grid.num_tokens):
        t, h, w = n // (grid.h * grid.w), n // grid.w % grid.h, n % grid.w
        expected = clips[:, :, 2 * t : 2 * t + 2, 4 * h : 4 * h + 4, 5 * w : 5 * w + 5]
        assert patches[:, n].equal(expected.flatten(1))


def test_a_linear_map_of_patches_is_a_convolution_with_that_stride() -> None:
    generator = torch.Generator().manual_seed(0)
    images, weight = torch.randn(2, 3, 8, 12, generator=generator), torch.randn(6, 3, 4, 4, generator=generator)
    convolved = F.conv2d(images, weight, stride=4).flatten(2).mT
    torch.testing.assert_close(patchify(images[:, :, None], (1, 4, 4)) @ weight.flatten(1).T, convolved)


def test_positions_follow_the_published_formula() -> None:
    grid, width = PatchGrid(1, 3, 5), 16
    positions = sincos(grid, width)
    for n in range(grid.num_tokens):
        expected = []
        for coordinate in (n // 5, n % 5):
            angles = [coordinate / 10000 ** (i / (width // 4)) for i in range(width // 4)]
            expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        torch.testing.assert_close(positions[n], torch.tensor(expected))


@given(height=st.integers(2, 8), width=st.integers(2, 8))
@settings(max_examples=20, deadline=None)
def test_similarity_of_positions_depends_on_their_distance_alone(height: int, width: int) -> None:
    positions = sincos(PatchGrid(1, height, width), 32).unflatten(0, (height, width))
    torch.testing.assert_close(
        (positions[:-1, :-1] * positions[1:, 1:]).sum(-1),
        (positions[0, 0] @ positions[1, 1]).expand(height - 1, width - 1),
    )
    similarity = F.normalize(positions.flatten(0, 1)) @ F.normalize(positions.flatten(0, 1)).T
    assert (similarity - torch.eye(height * width)).max() < 1 - 1e-3


def test_positions_refuse_what_they_cannot_describe() -> None:
    with pytest.raises(ValueError, match="num_frames=1"):
        sincos(PatchGrid(2, 2, 2), 16)
    with pytest.raises(ValueError, match="divisible by 4, got 18"):
        sincos(PatchGrid(1, 2, 2), 18)


@given(num_context=st.integers(1, 6), num_blocks=st.integers(1, 4), block_size=st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_a_block_sees_the_context_and_itself(num_context: int, num_blocks: int, block_size: int) -> None:
    owner = [0] * num_context + [m for m in range(1, num_blocks + 1) for _ in range(block_size)]
    expected = [[0.0 if key in (0, query) else -math.inf for key in owner] for query in owner]
    bias = block_bias(num_context, num_blocks, block_size, CPU, torch.float32)
    assert bias.tolist() == expected


def test_a_bias_first_made_for_an_evaluation_serves_training() -> None:
    cached_block_bias.cache_clear()
    with torch.inference_mode():
        cached_block_bias(2, 1, 2, CPU, torch.float32)
    bias = cached_block_bias(2, 1, 2, CPU, torch.float32)
    q = torch.randn(1, 1, 4, 8, requires_grad=True)
    F.scaled_dot_product_attention(q, q, q, attn_mask=bias).sum().backward()
    assert q.grad is not None


def test_both_attention_kernels_compute_the_same_function() -> None:
    torch.manual_seed(0)
    block, cross = (
        make_blocks(width=16, depth=1, num_heads=2, mlp_ratio=2.0)[0],
        CrossAttentionBlock(width=16, num_heads=2, mlp_ratio=2.0),
    )
    tokens, context = torch.randn(2, 8, 16), torch.randn(2, 3, 16)
    bias = block_bias(2, 2, 3, CPU, torch.float32)
    outputs = []
    for dtype in (torch.float32, torch.bfloat16):
        for module in (block, cross):
            choose_attention(module, CPU, dtype)
        outputs.append((block(tokens, attn_mask=bias), cross(tokens, context)))
    torch.testing.assert_close(outputs[0], outputs[1])


@pytest.mark.parametrize(
    ("device", "dtype", "fused"),
    [("cpu", torch.bfloat16, False), ("cpu", torch.float32, True), ("cuda", torch.bfloat16, True)],
)
def test_only_bfloat16_on_the_cpu_leaves_fused_attention(device: str, dtype: torch.dtype, fused: bool) -> None:
    blocks = make_blocks(width=8, depth=2, num_heads=2, mlp_ratio=2.0).append(
        CrossAttentionBlock(width=8, num_heads=2, mlp_ratio=2.0)
    )
    choose_attention(blocks, torch.device(device), dtype)
    assert [block.get_submodule("attn").fused_attn for block in blocks] == [fused] * 3


def test_drop_path_grows_linearly_with_depth() -> None:
    blocks = make_blocks(width=8, depth=5, num_heads=2, mlp_ratio=2.0, drop_path=0.4)
    rates = [getattr(block.get_submodule("drop_path1"), "drop_prob", 0.0) for block in blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
