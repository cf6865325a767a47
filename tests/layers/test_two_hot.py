"""Two-hot codes: the values come back, rare ones count by their share."""

from __future__ import annotations

import pytest
import torch

from jepa.layers.two_hot import NUM_BINS, TwoHot


def logits_of(code: TwoHot, probabilities: torch.Tensor) -> torch.Tensor:
    return probabilities.clamp(min=1e-30).log() - code.prior


def test_values_come_back_from_their_code() -> None:
    values = torch.tensor([-300.0, -1.0, -1e-3, 0.0, 1e-4, 0.3, 1.0, 25.0, 9e4])
    codes = TwoHot().encode(values)
    assert torch.allclose(codes.sum(dim=-1), torch.ones(9), atol=1e-6)
    assert (codes > 0).sum(dim=-1).max() <= 2
    assert torch.allclose(TwoHot().mean(logits_of(TwoHot(), codes)), values, rtol=1e-4, atol=1e-5)


def test_nothing_is_expected_of_uniform_logits() -> None:
    assert TwoHot().mean(torch.zeros(3, NUM_BINS)).tolist() == [0, 0, 0]


def test_a_rare_value_counts_by_its_probability() -> None:
    codes = TwoHot().encode(torch.tensor([0.0, 40.0]))
    mixed = 0.9 * codes[0] + 0.1 * codes[1]
    assert TwoHot().mean(logits_of(TwoHot(), mixed)).item() == pytest.approx(4.0, rel=1e-4)


def test_the_loss_is_least_at_the_code_of_the_value() -> None:
    code, value = TwoHot(), torch.tensor(2.5)
    best = code.loss(logits_of(code, code.encode(value)), value)
    for seed in range(5):
        other = torch.randn(NUM_BINS, generator=torch.Generator().manual_seed(seed))
        assert code.loss(other, value) > best


def test_bins_that_no_value_was_in_do_not_count() -> None:
    code = TwoHot()
    layer = torch.nn.Linear(4, NUM_BINS)
    optimizer = torch.optim.Adam(layer.parameters(), lr=5e-2)
    inputs, values = torch.eye(4), torch.tensor([0.0, 0.9, -0.5, 3.0])
    for _ in range(400):
        optimizer.zero_grad()
        code.loss(layer(inputs), values).mean().backward()
        optimizer.step()
    assert torch.allclose(code.mean(layer(inputs)), values, atol=0.05)
