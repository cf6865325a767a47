"""Returns of imagined steps."""

from __future__ import annotations

import torch
from torch import Tensor


def lambda_returns(rewards: Tensor, goes_on: Tensor, values: Tensor, *, gamma: float, lam: float) -> Tensor:
    """TD(lambda) returns [H, B] of H steps (Sutton & Barto 2018, equation 12.18; DreamerV3, equation 7).

    Reward t [H, B] and the probability `goes_on` t [H, B] that the world did not end belong to the step from state t to
    t + 1; values [H + 1, B] are those of the states 0 to H. The return of step t is the reward, and, discounted, a
    mixture of the value of state t + 1 and of the return of step t + 1.
    """
    following, returns = values[-1], []
    for step in reversed(range(len(rewards))):
        mixed = (1 - lam) * values[step + 1] + lam * following
        following = rewards[step] + gamma * goes_on[step] * mixed
        returns.append(following)
    return torch.stack(returns[::-1])


def still_alive(goes_on: Tensor) -> Tensor:
    """[H, B] -> [H, B]: the probability that the world has not ended before each step"""
    return torch.cat([torch.ones_like(goes_on[:1]), goes_on[:-1]]).cumprod(dim=0)
