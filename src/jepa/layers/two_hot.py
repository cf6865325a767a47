"""Scalars as distributions over bins, for values of any size and for rare ones (DreamerV3, Hafner et al. 2023)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_BINS = 129
LARGEST = 12.0
"""Logarithm of 1 plus the largest value."""
PRIOR = 2.0
"""Fall of the logits towards large values, for each unit of the logarithm: a trace of probability at bins that no value
was ever in would otherwise outweigh all others in the mean."""


class TwoHot(nn.Module):
    """Logits [.., NUM_BINS] over bins that lie densely around zero; a value between two bins is a mixture of both.

    The mean is in the space of the values, so that a share p of probability at a value v adds p v. Values beyond the
    largest bin count as that bin.
    """

    bins: Tensor
    prior: Tensor

    def __init__(self) -> None:
        super().__init__()
        steps = torch.linspace(-LARGEST, LARGEST, NUM_BINS, dtype=torch.float64)
        self.register_buffer("bins", (steps.sign() * steps.abs().expm1()).float(), persistent=False)
        self.register_buffer("prior", -PRIOR * steps.abs().float(), persistent=False)

    def encode(self, values: Tensor) -> Tensor:
        """[..] -> probabilities [.., NUM_BINS] with the values as their means"""
        values = values.float().clamp(self.bins[0], self.bins[-1])
        above = torch.searchsorted(self.bins, values.contiguous()).clamp(1, NUM_BINS - 1)
        low, high = self.bins[above - 1], self.bins[above]
        share = (values - low) / (high - low)
        return F.one_hot(above, NUM_BINS) * share[..., None] + F.one_hot(above - 1, NUM_BINS) * (1 - share)[..., None]

    def loss(self, logits: Tensor, values: Tensor) -> Tensor:
        """[.., NUM_BINS], [..] -> cross-entropies [..]"""
        return -(self.encode(values) * (logits.float() + self.prior).log_softmax(dim=-1)).sum(dim=-1)

    def mean(self, logits: Tensor) -> Tensor:
        """[.., NUM_BINS] -> [..]; exactly 0 for uniform logits, whose bins cancel"""
        probabilities = (logits.float() + self.prior).softmax(dim=-1)
        half = NUM_BINS // 2
        return ((probabilities[..., half + 1 :] - probabilities[..., :half].flip(-1)) * self.bins[half + 1 :]).sum(
            dim=-1
        )
