"""Vectors become codes: the nearest ones, with straight-through gradients, and none of them dies."""

from __future__ import annotations

import pytest
import torch

from jepa.layers.quantizers import FiniteScalarQuantizer, VectorQuantizer, farthest


def vectors(count: int = 40, dim: int = 3, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def vector_quantizer(num_codes: int = 8, dim: int = 3) -> VectorQuantizer:
    torch.manual_seed(0)
    return VectorQuantizer(num_codes=num_codes, dim=dim)


def test_the_nearest_code_is_taken() -> None:
    quantizer, values = vector_quantizer(), vectors()
    quantized = quantizer(values)
    assert torch.equal(quantized.codes, torch.cdist(values, quantizer.codebook).argmin(dim=1))
    torch.testing.assert_close(quantized.vectors, quantizer.codebook[quantized.codes])
    assert quantized.loss.item() == pytest.approx((values - quantized.vectors).square().mean().item(), rel=1e-5)


@pytest.mark.parametrize("quantizer", [vector_quantizer(), FiniteScalarQuantizer(levels=[5, 4, 3])], ids=["vq", "fsq"])
def test_codes_can_be_looked_up_and_gradients_pass(quantizer: VectorQuantizer | FiniteScalarQuantizer) -> None:
    values = vectors().unflatten(0, (4, 10)).requires_grad_()
    quantized = quantizer(values)
    assert quantized.codes.shape == (4, 10)
    assert 0 <= quantized.codes.min() <= quantized.codes.max() < quantizer.num_codes
    torch.testing.assert_close(quantizer.lookup(quantized.codes), quantized.vectors.detach())
    quantized.vectors.sum().backward()
    assert values.grad is not None
    assert values.grad.abs().min() > 0


def test_of_vectors_that_pass_straight_through_the_gradient_is_one() -> None:
    values = vectors().requires_grad_()
    vector_quantizer()(values).vectors.sum().backward()
    torch.testing.assert_close(values.grad, torch.ones_like(values))


@pytest.mark.parametrize("levels", [[3], [4], [8, 8, 8], [5, 3]], ids=str)
def test_every_code_of_fsq_is_reached(levels: list[int]) -> None:
    quantizer = FiniteScalarQuantizer(levels=levels)
    values = torch.randn(40_000, len(levels), generator=torch.Generator().manual_seed(0))
    codes = quantizer(values).codes
    assert len(codes.unique()) == quantizer.num_codes
    for axis, count in enumerate(levels):
        assert len(quantizer(values).vectors[:, axis].unique()) == count


def test_farthest_vectors_begin_with_the_outermost() -> None:
    points = torch.tensor([[0.0, 0], [0.1, 0], [10, 0], [0, 6], [10, 0.1]])
    assert farthest(points, 3).tolist() == [[0, 6], [10, 0], [pytest.approx(0.1), 0]]


def test_the_first_step_takes_codes_from_the_data() -> None:
    quantizer, values = vector_quantizer(), vectors() + 50
    quantizer(values)
    quantizer.after_step(0)
    assert all((values == code).all(dim=1).any() for code in quantizer.codebook)


def test_codes_move_to_the_mean_of_what_they_encode() -> None:
    quantizer = vector_quantizer(2, 1)
    quantizer.codebook.copy_(torch.tensor([[-1.0], [1.0]]))
    quantizer.sums.copy_(quantizer.codebook)
    for step in range(1, 400):
        quantizer(torch.tensor([[-3.0], [-5.0], [2.0]]))
        quantizer.after_step(step)
    torch.testing.assert_close(quantizer.codebook, torch.tensor([[-4.0], [2.0]]), rtol=0.01, atol=0.01)


def test_a_dead_code_is_revived_where_vectors_are_far_from_all_codes() -> None:
    quantizer = vector_quantizer(3, 1)
    quantizer.codebook.copy_(torch.tensor([[0.0], [1.0], [900.0]]))
    quantizer.counts.copy_(torch.tensor([5.0, 5.0, 0.0]))
    quantizer.sums.copy_(quantizer.codebook * quantizer.counts[:, None])
    quantizer(torch.tensor([[0.0], [1.0], [30.0]]))
    quantizer.after_step(10)
    assert quantizer.codebook[2].item() == 30


def test_no_code_is_revived_where_all_vectors_have_one() -> None:
    quantizer = vector_quantizer(3, 1)
    quantizer.codebook.copy_(torch.tensor([[0.0], [1.0], [900.0]]))
    quantizer.counts.copy_(torch.tensor([5.0, 5.0, 0.01]))
    quantizer.sums.copy_(quantizer.codebook * quantizer.counts[:, None])
    quantizer(torch.tensor([[0.0], [1.0]]).repeat(10, 1))
    quantizer.after_step(10)
    assert quantizer.codebook[2].item() > 800


def test_parts_of_a_batch_move_the_codes_as_the_whole() -> None:
    whole, parts, values = vector_quantizer(), vector_quantizer(), vectors()
    for step in (0, 1, 10):
        whole(values)
        for part in values.chunk(4):
            parts(part)
        for quantizer in (whole, parts):
            quantizer.after_step(step)
    torch.testing.assert_close(whole.codebook, parts.codebook)


def test_a_step_without_finite_numbers_moves_nothing() -> None:
    quantizer = vector_quantizer()
    before = quantizer.codebook.clone()
    quantizer(torch.full((4, 3), float("nan")))
    quantizer.after_step(1)
    torch.testing.assert_close(quantizer.codebook, before)


def test_evaluation_leaves_the_codes_alone() -> None:
    quantizer = vector_quantizer().eval()
    quantizer(vectors())
    assert quantizer.recent.numel() == quantizer.new_counts.count_nonzero() == 0
