"""Lambda-returns: against brute force, and each mistake of bootstrap, discount and end that is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from jepa.rl.returns import lambda_returns

H, B = 5, 3


def steps(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    shapes = ((H, B), (H, B), (H + 1, B))
    rewards, goes_on, values = (torch.rand(shape, generator=random, dtype=torch.float64) for shape in shapes)
    return rewards, goes_on, values


def n_step(rewards: Tensor, goes_on: Tensor, values: Tensor, step: int, count: int, gamma: float) -> Tensor:
    """The rewards of `count` steps, then the value: [B]"""
    total, weight = torch.zeros(B, dtype=torch.float64), torch.ones(B, dtype=torch.float64)
    for k in range(count):
        total = total + weight * rewards[step + k]
        weight = weight * gamma * goes_on[step + k]
    return total + weight * values[step + count]


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
def test_returns_are_the_weighted_mean_of_n_step_returns(lam: float) -> None:
    parts, gamma = steps(), 0.9
    for step in range(H):
        left = H - step
        expected = lam ** (left - 1) * n_step(*parts, step, left, gamma)
        for count in range(1, left):
            expected = expected + (1 - lam) * lam ** (count - 1) * n_step(*parts, step, count, gamma)
        assert torch.allclose(lambda_returns(*parts, gamma=gamma, lam=lam)[step], expected)


def test_the_value_is_that_of_the_next_state() -> None:
    rewards, goes_on, values = torch.zeros(H, 1), torch.ones(H, 1), torch.arange(H + 1.0)[:, None]
    assert lambda_returns(rewards, goes_on, values, gamma=1.0, lam=0.0)[:, 0].tolist() == [1, 2, 3, 4, 5]


def test_nothing_counts_after_the_end_but_the_reward_of_the_last_step_does() -> None:
    rewards, goes_on, values = torch.ones(H, 1), torch.ones(H, 1), torch.full((H + 1, 1), 100.0)
    goes_on[2] = 0.0
    returns = lambda_returns(rewards, goes_on, values, gamma=1.0, lam=1.0)[:, 0].tolist()
    assert returns[:3] == [3, 2, 1]
    assert returns[3:] == [102, 101]
