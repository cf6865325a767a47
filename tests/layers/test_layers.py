"""Tokens, positions and attention, which encoders and predictors share."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import Block
from torch import Tensor

from jepa.layers.attention import CrossAttentionBlock, apply_rope, block_bias, choose_attention, same_group
from jepa.layers.position import Positions, cached_table, coordinates, rope_table, sincos, waves
from jepa.layers.tokens import count_parts, gather_tokens, patchify
from jepa.layers.transformer import make_blocks
from jepa.types import PatchGrid

CPU = torch.device("cpu")


@pytest.mark.parametrize("shape", [(5,), (2, 3), (1, 1)])
def test_gather_tokens_selects_the_tokens_of_each_sample_at_its_own_indices(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(3, 7, 4, generator=generator)
    indices = torch.randint(7, (3, *shape), generator=generator)
    assert gather_tokens(tokens, indices).equal(torch.stack([tokens[b][indices[b]] for b in range(3)]))


def test_gather_tokens_sends_gradients_to_the_selected_tokens() -> None:
    tokens = torch.zeros(1, 4, 2, requires_grad=True)
    gather_tokens(tokens, torch.tensor([[[1, 3], [3, 3]]])).sum().backward()
    assert tokens.grad is not None
    assert tokens.grad[0, :, 0].tolist() == [0, 1, 0, 3]


def test_a_patch_has_the_pixels_at_its_position_in_the_grid() -> None:
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
def test_similarity_of_positions_depends_only_on_their_distance(height: int, width: int) -> None:
    positions = sincos(PatchGrid(1, height, width), 32).unflatten(0, (height, width))
    torch.testing.assert_close(
        (positions[:-1, :-1] * positions[1:, 1:]).sum(-1),
        (positions[0, 0] @ positions[1, 1]).expand(height - 1, width - 1),
    )
    similarity = F.normalize(positions.flatten(0, 1)) @ F.normalize(positions.flatten(0, 1)).T
    assert (similarity - torch.eye(height * width)).max() < 1 - 1e-3


@pytest.mark.parametrize("width", [12, 18, 20, 22])
def test_positions_in_time_give_each_axis_an_equal_even_share(width: int) -> None:
    grid = PatchGrid(4, 3, 5)
    parts = sincos(grid, width).split(width // 6 * 2, dim=1)
    for part, axis in zip(parts, coordinates(grid), strict=False):
        torch.testing.assert_close(part, waves(axis, width // 6 * 2).float())
    assert len(parts) == 3 or not parts[3].any()


@given(
    small=st.tuples(st.integers(2, 3), st.integers(1, 3), st.integers(1, 3)),
    more=st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(0, 2)),
    kind=st.sampled_from(["sincos", "rope", "vjepa2"]),
)
@settings(max_examples=30, deadline=None)
def test_a_larger_grid_keeps_the_positions_of_a_smaller_one(small: tuple, more: tuple, kind: str) -> None:
    large = tuple(a + b for a, b in zip(small, more, strict=True))
    tables = []
    for size in (small, large):
        positions = Positions(grid=PatchGrid(*size), width=16, kind=kind, in_time=True)
        tables.append(positions.table.unflatten(0, size))
    assert tables[1][: small[0], : small[1], : small[2]].equal(tables[0])


def test_positions_of_another_grid_are_those_of_a_module_built_for_it() -> None:
    grid, other_grid = PatchGrid(2, 2, 3), PatchGrid(1, 3, 2)
    tokens, indices = torch.randn(2, 6, 12), torch.tensor([[0, 5, 2], [1, 1, 4]])
    for kind in ("sincos", "rope"):
        both = [Positions(grid=built_for, width=12, kind=kind, in_time=True) for built_for in (grid, other_grid)]
        assert both[0].add(tokens, other_grid).equal(both[1].add(tokens, other_grid))
        rope = [positions.rope(tokens, other_grid, indices) for positions in both]
        assert (rope[0] is None) == (rope[1] is None) == (kind == "sincos")
        if rope[0] is not None:
            assert rope[0].equal(rope[1])


def logits(q: Tensor, k: Tensor, table: Tensor) -> Tensor:
    """Query [d], key [d], table [N, 2, d] -> [N, N]: logits for all pairs of positions."""
    rope = table.movedim(1, 0)[:, None, :, None, None]  # [2, 1, N, 1, 1, d]
    pair = torch.stack([q, k])[None, None, :, None].expand(1, len(table), 2, 1, -1)
    q_rotated, k_rotated = apply_rope(pair, rope)[0, :, :, 0].unbind(1)
    return q_rotated @ k_rotated.T


def test_rotary_logits_depend_only_on_the_difference_of_positions() -> None:
    grid = PatchGrid(3, 4, 5)
    q, k = torch.randn(2, 20, generator=torch.Generator().manual_seed(0)).double()
    values = logits(q, k, rope_table(grid, 20).double()).flatten()
    positions = torch.stack(coordinates(grid), dim=1)
    _, kind = (positions[:, None] - positions).flatten(0, 1).unique(dim=0, return_inverse=True)
    means = torch.zeros(int(kind.max()) + 1).double().scatter_reduce_(0, kind, values, "mean", include_self=False)
    torch.testing.assert_close(values, means[kind], rtol=1e-5, atol=1e-5)
    assert means.std() > 0.1


def test_a_rotation_is_the_product_of_complex_numbers() -> None:
    grid, head_dim = PatchGrid(2, 3, 4), 20
    x = torch.randn(1, 24, 2, 3, head_dim, generator=torch.Generator().manual_seed(0))
    angles = [axis[:, None] / 10000 ** (torch.arange(3) / 3) for axis in coordinates(grid)]  # 3 x [24, 3]
    factor = torch.polar(torch.ones(24, 10), F.pad(torch.cat(angles, dim=1), (0, 1)).float())
    expected = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * factor[:, None, None]).flatten(-2)
    rope = rope_table(grid, head_dim).movedim(1, 0)[:, None, :, None, None]
    torch.testing.assert_close(apply_rope(x, rope), expected)


def test_interleaved_rope_tiles_the_frequencies_and_is_equal_for_a_single_one() -> None:
    grid = PatchGrid(2, 2, 2)
    assert rope_table(grid, 8, interleaved=True).equal(rope_table(grid, 8)), "one frequency an axis"
    ours, theirs = (
        rope_table(grid, 12)[:, 0],
        rope_table(grid, 12, interleaved=True)[:, 0],
    )  # cosines of 3 x (2 frequencies, twice)
    assert theirs.unflatten(1, (3, 4))[..., [0, 2, 1, 3]].flatten(1).equal(ours)


def test_rotation_keeps_the_length_of_queries() -> None:
    x = torch.randn(2, 8, 2, 3, 14, generator=torch.Generator().manual_seed(0))
    rope = rope_table(PatchGrid(2, 2, 2), 14).movedim(1, 0)[:, None, :, None, None]
    torch.testing.assert_close(apply_rope(x, rope).norm(dim=-1), x.norm(dim=-1))


@pytest.mark.parametrize("fused", [True, False])
def test_a_block_with_zero_rotations_is_timms_block(fused: bool) -> None:
    torch.manual_seed(0)
    (block,) = make_blocks(width=24, depth=1, num_heads=2, mlp_ratio=2.0)
    timms = Block(24, 2, mlp_ratio=2.0, qkv_bias=True)
    timms.load_state_dict(block.state_dict())
    tokens, bias = torch.randn(2, 8, 24), block_bias(2, 2, 3, CPU, torch.float32)
    for attention in (block.get_submodule("attn"), timms.attn):
        attention.fused_attn = fused  # pyright: ignore[reportArgumentType]
    no_rotation = torch.stack([torch.ones(8, 12), torch.zeros(8, 12)])[:, None, :, None, None]
    for mask in (None, bias):
        assert block(tokens, mask).equal(timms(tokens, mask))
        torch.testing.assert_close(block(tokens, mask, rope=no_rotation), timms(tokens, mask))


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (lambda: sincos(PatchGrid(1, 2, 2), 18), "divisible by 4, got 18"),
        (lambda: sincos(PatchGrid(2, 2, 2), 5), "at least 6, got 5"),
        (lambda: rope_table(PatchGrid(2, 2, 2), 4), "at least 6, got 4: change num_heads"),
        (lambda: rope_table(PatchGrid(2, 2, 2), 9), "even width of each head, at least 6, got 9"),
        (
            lambda: count_parts(7, 2, "num_frames", "tubelet", "this"),
            r"num_frames 7 .* tubelet's 2: change this \(nearest: 6 and 8\)",
        ),
        (lambda: count_parts(3, 8, "image width", "patch", "this"), r"change this \(nearest: 8\)"),
    ],
)
def test_impossible_sizes_are_refused(refused: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        refused()


def test_tokens_attend_to_their_own_group() -> None:
    bias = same_group(torch.tensor([[0, 0, 1], [2, 0, 2]]), torch.float32)
    no = -math.inf
    assert bias[0, 0].tolist() == [[0, 0, no], [0, 0, no], [no, no, 0]]
    assert bias[1, 0].tolist() == [[0, no, 0], [no, 0, no], [0, no, 0]]


@given(num_context=st.integers(1, 6), num_blocks=st.integers(1, 4), block_size=st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_a_block_attends_to_the_context_and_to_itself(num_context: int, num_blocks: int, block_size: int) -> None:
    groups = [0] * num_context + [m for m in range(1, num_blocks + 1) for _ in range(block_size)]
    expected = [[0.0 if key in (0, query) else -math.inf for key in groups] for query in groups]
    bias = block_bias(num_context, num_blocks, block_size, CPU, torch.float32)
    assert bias.tolist() == expected


def test_a_bias_cached_in_inference_mode_can_be_used_in_training() -> None:
    arguments = (block_bias, 2, 1, 2, CPU, torch.float32)
    with torch.inference_mode():
        bias = cached_table(*arguments)
    assert cached_table(*arguments) is bias, "made once"
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
def test_attention_is_fused_except_for_bfloat16_on_the_cpu(device: str, dtype: torch.dtype, fused: bool) -> None:
    blocks = make_blocks(width=8, depth=2, num_heads=2, mlp_ratio=2.0).append(
        CrossAttentionBlock(width=8, num_heads=2, mlp_ratio=2.0)
    )
    choose_attention(blocks, torch.device(device), dtype)
    assert [block.get_submodule("attn").fused_attn for block in blocks] == [fused] * 3


def test_drop_path_grows_linearly_with_depth() -> None:
    blocks = make_blocks(width=8, depth=5, num_heads=2, mlp_ratio=2.0, drop_path=0.4)
    rates = [getattr(block.get_submodule("drop_path1"), "drop_prob", 0.0) for block in blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
