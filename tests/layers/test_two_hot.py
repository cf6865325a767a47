"""Two-hot codes: the values come back, rare ones count by their share."""

from __future__ import annotations

import pytest
import torch

from jepa.layers.two_hot import NUM_BINS, TwoHot


def test_values_come_back_from_their_code() -> None:
    values = torch.tensor([-300.0, -1.0, -1e-3, 0.0, 1e-4, 0.3, 1.0, 25.0, 9e4])
    codes = TwoHot().encode(values)
    assert torch.allclose(codes.sum(dim=-1), torch.ones(9), atol=1e-6)
    assert (codes > 0).sum(dim=-1).max() <= 2
    assert torch.allclose(TwoHot().mean(codes.clamp(min=1e-30).log()), values, rtol=1e-4, atol=1e-6)


def test_nothing_is_expected_of_uniform_logits() -> None:
    assert TwoHot().mean(torch.zeros(3, NUM_BINS)).tolist() == [0, 0, 0]


def test_a_rare_value_counts_by_its_probability() -> None:
    codes = TwoHot().encode(torch.tensor([0.0, 40.0]))
    mixed = (0.9 * codes[0] + 0.1 * codes[1]).clamp(min=1e-30).log()
    assert TwoHot().mean(mixed).item() == pytest.approx(4.0, rel=1e-4)


def test_the_loss_is_least_at_the_code_of_the_value() -> None:
    code, value = TwoHot(), torch.tensor(2.5)
    best = code.loss(code.encode(value).clamp(min=1e-30).log(), value)
    for seed in range(5):
        other = torch.randn(NUM_BINS, generator=torch.Generator().manual_seed(seed))
        assert code.loss(other, value) > best
