"""Predictors: each target block is predicted from the context alone, whatever the other blocks are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch
from checked import checked
from torch import Tensor, nn

from jepa.optim import parameter_groups
from jepa.predictors.cross_attention import CrossAttentionPredictor
from jepa.predictors.transformer import TransformerPredictor
from jepa.types import Masks, PatchGrid

GRID = PatchGrid(1, 4, 6)
CLIP_GRID = PatchGrid(4, 3, 2)
"""A grid with the same number of tokens."""
B, K, M, J, D = 2, 5, 3, 4, 16
Predictor = TransformerPredictor | CrossAttentionPredictor
AnyPredictor = TypeVar("AnyPredictor", TransformerPredictor, CrossAttentionPredictor)


def joint(**changes: Any) -> TransformerPredictor:
    sizes: dict[str, Any] = {"grid": GRID, "embed_dim": D, "num_heads": 2, "width": 12, "depth": 3, "mlp_ratio": 2.0}
    torch.manual_seed(0)
    return with_large_weights(checked(TransformerPredictor, **(sizes | changes)))


def apart(**changes: Any) -> TransformerPredictor:
    return joint(joint=False, **changes)


def cross(**changes: Any) -> CrossAttentionPredictor:
    sizes: dict[str, Any] = {"grid": GRID, "embed_dim": D, "num_heads": 2, "width": 12, "depth": 3, "mlp_ratio": 2.0}
    torch.manual_seed(0)
    return with_large_weights(checked(CrossAttentionPredictor, **(sizes | changes)))


def with_large_weights(predictor: AnyPredictor) -> AnyPredictor:
    """Weights larger than the initial ones, in float64, so that every dependence is visible."""
    for parameter in predictor.double().parameters():
        nn.init.normal_(parameter, std=0.5)
    return predictor


def rope(**changes: Any) -> TransformerPredictor:
    return joint(**({"position": "rope", "grid": CLIP_GRID} | changes))


def rope_apart(**changes: Any) -> TransformerPredictor:
    return rope(joint=False, **changes)


def cross_on_clips(**changes: Any) -> CrossAttentionPredictor:
    return cross(**({"grid": CLIP_GRID} | changes))


def joint_on_clips(**changes: Any) -> TransformerPredictor:
    return joint(**({"grid": CLIP_GRID} | changes))


KINDS = pytest.mark.parametrize("make", [joint, apart, cross, rope, rope_apart, cross_on_clips, joint_on_clips])
Make = Callable[..., Predictor]


def sample() -> tuple[Tensor, Masks]:
    generator = torch.Generator().manual_seed(1)
    order = torch.stack([torch.randperm(GRID.num_tokens, generator=generator) for _ in range(B)])
    context, rest = order[:, :K].sort(dim=1).values, order[:, K:]
    columns = torch.randint(rest.shape[1], (B, M * J), generator=generator)
    targets = rest.gather(1, columns).unflatten(1, (M, J)).sort(dim=2).values
    return torch.randn(B, K, D, generator=generator, dtype=torch.float64), Masks(context, targets)


def only(masks: Masks, *blocks: int) -> Masks:
    return masks._replace(targets=masks.targets[:, list(blocks)])


def attend(block: Any, x: Tensor, keys: Tensor) -> Tensor:
    """One pre-norm block [S, W] whose queries `x` attend to `keys` [R, W], head by head."""
    weight, bias = block.attn.qkv.weight.chunk(3), block.attn.qkv.bias.chunk(3)
    q = block.norm1(x) @ weight[0].T + bias[0]
    k, v = (block.norm1(keys) @ weight[i].T + bias[i] for i in (1, 2))
    heads = [
        ((qh @ kh.T) / kh.shape[1] ** 0.5).softmax(dim=1) @ vh
        for qh, kh, vh in zip(*(part.chunk(2, dim=1) for part in (q, k, v)), strict=True)
    ]
    x = x + block.attn.proj(torch.cat(heads, dim=1))
    return x + block.mlp(block.norm2(x))


def one_block(predictor: TransformerPredictor, context: Tensor, visible: Tensor, hidden: Tensor) -> Tensor:
    """[K, D], [K], [J] -> [J, D]: the joint pass for a single block of a single sample"""
    stream = predictor.embed(context) + predictor.positions.table[visible]
    block_stream = predictor.mask_tokens[0] + predictor.positions.table[hidden]
    for block in predictor.blocks:
        new = attend(block, block_stream, torch.cat([stream, block_stream]))
        stream, block_stream = attend(block, stream, stream), new
    return predictor.project(predictor.norm(block_stream))


def test_joint_pass_equals_separate_passes_in_which_the_context_attends_to_itself() -> None:
    predictor = joint()
    context, masks = sample()
    results = []
    for route in ("joint", "apart"):
        predictor.zero_grad()
        context = context.detach().requires_grad_()
        if route == "joint":
            predicted = predictor(context, masks)
        else:
            predicted = torch.stack(
                [
                    torch.stack(
                        [one_block(predictor, context[b], masks.context[b], masks.targets[b, m]) for m in range(M)]
                    )
                    for b in range(B)
                ]
            )
        predicted.sin().sum().backward()
        results.append([predicted, context.grad, *(p.grad for p in predictor.parameters())])
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("make", [joint, joint_on_clips])
def test_context_predictions_of_the_joint_pass_do_not_depend_on_the_blocks(make: Make) -> None:
    predictor, (context, masks) = make(), sample()
    both = predictor(context, masks, predict_context=True)
    assert both.shape == (B, K + M * J, D)
    torch.testing.assert_close(both[:, K:].unflatten(1, (M, J)), predictor(context, masks))
    torch.testing.assert_close(predictor(context, only(masks, 1), predict_context=True)[:, :K], both[:, :K])


@KINDS
def test_a_block_does_not_depend_on_the_other_blocks(make: Make) -> None:
    predictor, (context, masks) = make(), sample()
    together = predictor(context, masks)
    for m in range(M):
        torch.testing.assert_close(predictor(context, only(masks, m)), together[:, [m]])
    torch.testing.assert_close(predictor(context, only(masks, 2, 0, 1)), together[:, [2, 0, 1]])


@KINDS
def test_the_order_of_context_tokens_does_not_matter(make: Make) -> None:
    predictor, (context, masks) = make(), sample()
    shuffled = predictor(context.flip(1), masks._replace(context=masks.context.flip(1)))
    torch.testing.assert_close(shuffled, predictor(context, masks))


@KINDS
def test_predictions_come_in_the_order_of_their_indices(make: Make) -> None:
    predictor, (context, masks) = make(), sample()
    flipped = predictor(context, masks._replace(targets=masks.targets.flip(2)))
    torch.testing.assert_close(flipped, predictor(context, masks).flip(2))


@KINDS
def test_samples_do_not_affect_each_other(make: Make) -> None:
    predictor, (context, masks) = make(), sample()
    torch.testing.assert_close(
        predictor(context[:1], Masks(*(part[:1] for part in masks))), predictor(context, masks)[:1]
    )


@KINDS
def test_every_context_token_and_parameter_gets_a_gradient(make: Make) -> None:
    predictor, (context, masks) = make(), sample()
    predictor(context.requires_grad_(), masks).sin().sum().backward()
    assert context.grad is not None
    assert (context.grad.abs().sum(dim=2) > 0).all()
    assert all(p.grad is not None and p.grad.any() for p in predictor.parameters())


@KINDS
def test_positions_distinguish_the_axes(make: Make) -> None:
    predictor, (context, masks) = make(), sample()
    predictor.positions.table = predictor.positions.table.unflatten(0, (4, 6)).transpose(0, 1).flatten(0, 1)
    assert (predictor(context, masks) - make()(context, masks)).abs().max() > 1e-3


def test_repeated_context_attends_to_the_mask_tokens_of_its_block_and_joint_context_does_not() -> None:
    context, masks = sample()
    shallow, deep = (make(depth=depth)(context, masks) for depth, make in ((1, joint), (2, joint)))
    torch.testing.assert_close(shallow, apart(depth=1)(context, masks))
    assert (deep - apart(depth=2)(context, masks)).abs().max() > 1e-3


def test_rope_gives_the_same_attention_in_joint_and_separate_passes() -> None:
    context, masks = sample()
    torch.testing.assert_close(rope(depth=1)(context, masks), rope_apart(depth=1)(context, masks))


@pytest.mark.parametrize("position", ["rope", "vjepa2"])
def test_rope_predictions_depend_only_on_relative_positions(position: str) -> None:
    predictor, (context, masks) = rope(position=position), sample()
    wide = PatchGrid(6, 7, 5)

    def moved(indices: Tensor, by: tuple[int, int, int]) -> Tensor:
        t, h, w = indices // 6, indices // 2 % 3, indices % 2
        return ((t + by[0]) * wide.h + h + by[1]) * wide.w + w + by[2]

    expected = predictor(context, masks)
    for by in ((0, 0, 0), (2, 0, 0), (1, 4, 3)):
        moved_masks = Masks(moved(masks.context, by), moved(masks.targets, by))
        torch.testing.assert_close(predictor(context, moved_masks, wide), expected, rtol=1e-4, atol=1e-4)


@KINDS
def test_predictions_on_another_grid_equal_those_of_a_predictor_built_for_it(make: Make) -> None:
    predictor, (context, masks) = make(), sample()
    other = PatchGrid(3, 2, 4)
    predictor.positions.float()
    predicted = predictor(context, masks, other)
    torch.testing.assert_close(predicted, make(grid=other)(context, masks))
    assert (predicted - predictor(context, masks)).abs().max() > 1e-3


@KINDS
def test_each_mask_set_has_its_own_mask_token(make: Make) -> None:
    predictor, (context, masks) = make(num_mask_tokens=3), sample()
    predicted = [predictor(context, masks, mask_set=number) for number in range(3)]
    assert min((predicted[a] - predicted[b]).abs().max() for a, b in ((0, 1), (0, 2), (1, 2))) > 1e-3
    predicted[1].sin().sum().backward()
    assert predictor.mask_tokens.grad is not None
    assert predictor.mask_tokens.grad.any(dim=1).tolist() == [False, True, False]


@pytest.mark.parametrize("kind", [TransformerPredictor, CrossAttentionPredictor])
def test_mask_tokens_have_no_weight_decay(kind: type[Predictor]) -> None:
    predictor = kind(grid=GRID, embed_dim=D, num_heads=2, width=12, num_mask_tokens=2)
    decays = {id(p): group["decays"] for group in parameter_groups(predictor) for p in group["params"]}
    assert not decays[id(predictor.mask_tokens)]
    assert decays[id(predictor.embed.weight)]


def test_repeated_context_is_full_attention_over_context_and_one_block() -> None:
    predictor, (context, masks) = apart(), sample()
    for b in range(B):
        stream = torch.cat(
            [
                predictor.embed(context[b]) + predictor.positions.table[masks.context[b]],
                predictor.mask_tokens[0] + predictor.positions.table[masks.targets[b, 0]],
            ]
        )
        for block in predictor.blocks:
            stream = attend(block, stream, stream)
        expected = predictor.project(predictor.norm(stream[K:]))
        torch.testing.assert_close(predictor(context, masks)[b, 0], expected)


def test_cross_attention_queries_of_a_block_do_not_affect_each_other() -> None:
    predictor, (context, masks) = cross(), sample()
    together = predictor(context, masks)
    for j in range(J):
        alone = predictor(context, masks._replace(targets=masks.targets[:, :, [j]]))
        torch.testing.assert_close(alone, together[:, :, [j]])


@KINDS
def test_block_sizes_may_change_between_calls(make: Make) -> None:
    predictor, (context, masks) = make(), sample()
    expected = predictor(context, masks)
    for size in (1, 2, 3):
        assert predictor(context, masks._replace(targets=masks.targets[..., :size])).shape == (B, M, size, D)
    assert predictor(context, masks).equal(expected)


@pytest.mark.parametrize("kind", [TransformerPredictor, CrossAttentionPredictor])
def test_initial_residual_outputs_are_scaled_down_with_depth(kind: type[Predictor]) -> None:
    torch.manual_seed(0)
    predictor = kind(grid=GRID, embed_dim=D, num_heads=2, width=128, depth=3)
    for number, block in enumerate(predictor.blocks, start=1):
        for name in ("attn.proj", "mlp.fc2"):
            weight = block.get_parameter(f"{name}.weight")
            assert weight.std().item() == pytest.approx(0.6 / (weight.shape[1] * 2 * number) ** 0.5, rel=0.05)
    assert predictor.project.weight.std().item() == pytest.approx(0.6 / 128**0.5, rel=0.05)
    assert predictor.mask_tokens.std().item() == pytest.approx(0.02, rel=0.3)


@pytest.mark.parametrize("make", [joint, apart, cross])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, "predictor.width=12 is not divisible by predictor.num_heads=5"),
        ({"depth": 0}, "depth=0"),
        ({"width": 14}, "divisible by 4, got 14"),
        ({"grid": PatchGrid(2, 2, 2), "width": 4}, "at least 6, got 4"),
    ],
)
def test_refuses_sizes_that_do_not_fit(make: Make, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_refuses_rotary_positions_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="position=rotary: no such position; valid: sincos, rope, vjepa2"):
        joint(position="rotary")
    with pytest.raises(ValueError, match="at least 6, got 4"):
        joint(position="rope", width=8)
