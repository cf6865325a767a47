"""The variance and covariance terms against an independent formula, closed forms and symmetries."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from jepa.regularizers.vicreg import VICReg


def reference(x: np.ndarray, variance: float, covariance: float) -> float:
    """Loops over dimensions, in float64."""
    matrix = np.cov(x, rowvar=False, ddof=1)
    width = x.shape[1]
    hinge = np.mean([max(0.0, 1 - np.sqrt(matrix[d, d] + 1e-4)) for d in range(width)])
    cross = sum(matrix[i, j] ** 2 for i in range(width) for j in range(width) if i != j) / width
    return float(variance * hinge + covariance * cross)


def reference_gradient(x: np.ndarray, *weights: float) -> np.ndarray:
    """Central differences."""
    gradient = np.zeros_like(x)
    for place in np.ndindex(*x.shape):
        step = np.zeros_like(x)
        step[place] = 1e-6
        gradient[place] = (reference(x + step, *weights) - reference(x - step, *weights)) / 2e-6
    return gradient


def embeddings(num_samples: int = 12, width: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(num_samples, width, generator=generator) @ torch.randn(width, width, generator=generator)
    return mixed * torch.linspace(0.1, 1.0, width) + 3


@pytest.mark.parametrize("weights", [(1.0, 0.04), (25.0, 1.0), (0.0, 1.0), (1.0, 0.0)])
def test_value_and_gradient_equal_an_independent_formula(weights: tuple[float, float]) -> None:
    x = embeddings().requires_grad_()
    loss, _ = VICReg(variance=weights[0], covariance=weights[1])(x)
    loss.backward()
    array = x.detach().double().numpy()
    assert loss.item() == pytest.approx(reference(array, *weights), rel=1e-5)
    assert x.grad is not None
    np.testing.assert_allclose(x.grad, reference_gradient(array, *weights), rtol=1e-3, atol=1e-5)


def test_spread_and_uncorrelated_embeddings_cost_nothing() -> None:
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    loss, terms = VICReg()(2 * signs)
    assert loss == terms["variance"] == terms["covariance"] == 0


def test_collapsed_embeddings_pay_almost_one_for_variance_and_nothing_for_covariance() -> None:
    _, terms = VICReg()(torch.ones(4, 3))
    assert terms["variance"].item() == pytest.approx(1 - 1e-2)
    assert terms["covariance"] == 0


@pytest.mark.parametrize("width", [2, 3, 8])
def test_equal_dimensions_pay_their_squared_variance_for_each_other_dimension(width: int) -> None:
    column = torch.randn(16, 1, generator=torch.Generator().manual_seed(0))
    _, terms = VICReg()(column.expand(-1, width))
    assert terms["covariance"].item() == pytest.approx((width - 1) * column.var().item() ** 2, rel=1e-5)


def test_loss_ignores_a_shift_the_order_of_samples_the_order_and_the_sign_of_dimensions() -> None:
    x, regularizer = embeddings(), VICReg()
    expected, _ = regularizer(x)
    for same in (x + torch.arange(5.0), x.flip(0), x.flip(1), x * torch.tensor([1.0, -1, 1, -1, 1])):
        torch.testing.assert_close(regularizer(same)[0], expected)


def test_autocast_does_not_change_the_loss() -> None:
    x, regularizer = embeddings(), VICReg()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = regularizer(x)
    assert loss.dtype == torch.float32
    assert loss.equal(regularizer(x)[0])


def test_terms_are_detached() -> None:
    _, terms = VICReg()(embeddings().requires_grad_())
    assert not any(term.requires_grad for term in terms.values())


def test_refuses_negative_weights_and_a_batch_without_variance() -> None:
    with pytest.raises(ValueError, match="covariance=-1"):
        VICReg(covariance=-1)
    with pytest.raises(ValueError, match="at least 2 samples"):
        VICReg()(torch.zeros(1, 3))
