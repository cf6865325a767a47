"""Quantisers: vectors to codes of a finite set, with gradients that pass straight through."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa.parallel.collectives import gather_over_ranks, sum_over_ranks

AVERAGE = 0.98
"""Momentum of the averages that the vectors of a codebook follow."""
RARE = 0.02
"""Share of the mean use of a code below which it is dead."""
REVIVE_EVERY = 10
"""Steps between two looks for dead codes."""
MAX_RECENT = 8192
"""Vectors of a step that each rank keeps as candidates for codes."""
FAR = 0.01
"""Squared distance from the nearest code, as a share of the variance, above which a vector may become a code."""


class Quantized(NamedTuple):
    vectors: Tensor
    """float32 [.., d]: of the codes; their gradient is that of the vectors that were quantised"""
    codes: Tensor
    """long [..]"""
    loss: Tensor
    """float32 scalar: how far the vectors are from their codes"""


class VectorQuantizer(nn.Module):
    """The nearest of `num_codes` vectors, which follow what they encode (VQ-VAE, van den Oord et al. 2017).

    The averages of their appendix A.1 make the codebook no parameter: no optimizer and no sharding touches it. After
    the first step the vectors are those of the batch that lie farthest from each other, and later a vector that encodes
    next to nothing is replaced by one that is far from all others.
    """

    codebook: Tensor
    counts: Tensor
    sums: Tensor
    new_counts: Tensor
    new_sums: Tensor
    recent: Tensor

    def __init__(self, *, num_codes: int, dim: int) -> None:
        super().__init__()
        self.num_codes, self.dim = num_codes, dim
        self.register_buffer("codebook", torch.randn(num_codes, dim))
        self.register_buffer("counts", torch.ones(num_codes))
        self.register_buffer("sums", self.codebook.clone())
        for name, shape in {"new_counts": (num_codes,), "new_sums": (num_codes, dim), "recent": (0, dim)}.items():
            self.register_buffer(name, torch.zeros(shape), persistent=False)

    def forward(self, vectors: Tensor) -> Quantized:
        """float [.., dim]"""
        vectors = vectors.float()
        flat = vectors.detach().flatten(0, -2)
        codes = nearest(flat, self.codebook)
        if self.training:
            self.new_counts = self.new_counts.index_add(0, codes, torch.ones_like(flat[:, 0]))
            self.new_sums = self.new_sums.index_add(0, codes, flat)
            self.recent = torch.cat([self.recent, flat])[:MAX_RECENT]
        quantized = self.codebook[codes].view_as(vectors)
        loss = (vectors - quantized).square().mean()
        return Quantized(vectors + (quantized - vectors).detach(), codes.view(vectors.shape[:-1]), loss)

    def lookup(self, codes: Tensor) -> Tensor:
        """long [..] -> [.., dim]"""
        return self.codebook[codes]

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Move the codebook after optimizer step `step` (from 0) and what was seen in it, on all ranks."""
        if step == 0:
            self.codebook.copy_(farthest(gather_over_ranks(self.recent), self.num_codes))
            self.counts.fill_(1)
            self.sums.copy_(self.codebook)
        else:
            counts, sums = sum_over_ranks(self.new_counts), sum_over_ranks(self.new_sums)
            weight = (1 - AVERAGE) * sums.isfinite().all()  # a step that is skipped moves nothing
            self.counts.lerp_(counts, weight)
            self.sums.lerp_(sums.nan_to_num(), weight)
            if step % REVIVE_EVERY == 0:
                self._revive(gather_over_ranks(self.recent))
            self.codebook.copy_(self.sums / self.counts.clamp(min=1e-6)[:, None])
        self.recent = self.recent[:0]
        self.new_counts, self.new_sums = torch.zeros_like(self.counts), torch.zeros_like(self.sums)

    def _revive(self, recent: Tensor) -> None:
        """Replace dead codes by those of the recent vectors [n, dim] that are farthest from their codes."""
        usual = self.counts.mean()
        errors = (recent - self.codebook[nearest(recent, self.codebook)]).square().sum(dim=1)
        far = errors.topk(min(len(errors), self.num_codes))
        dead = self.counts.topk(len(far.values), largest=False)
        spread = recent.var(dim=0).sum()
        replaces = (dead.values < RARE * usual) & (far.values > FAR * spread)
        chosen = dead.indices[replaces]
        self.counts[chosen] = usual
        self.sums[chosen] = usual * recent[far.indices[replaces]]


class FiniteScalarQuantizer(nn.Module):
    """Each number rounded to one of a few levels (FSQ, Mentzer et al. 2024): no codebook, none that could die."""

    levels: Tensor
    bases: Tensor

    def __init__(self, *, levels: Sequence[int]) -> None:
        super().__init__()
        self.num_codes, self.dim = prod(levels), len(levels)
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        self.register_buffer("bases", torch.tensor([prod(levels[:n]) for n in range(len(levels))]), persistent=False)

    def forward(self, vectors: Tensor) -> Quantized:
        """float [.., dim], of any size; tanh bounds them"""
        half = (self.levels - 1) * (1 + 1e-3) / 2
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0)
        bounded = (vectors.float() + (offset / half).atanh()).tanh() * half - offset
        rounded = bounded + (bounded.round() - bounded).detach()
        codes = ((rounded.detach() + self.levels // 2).long() * self.bases).sum(dim=-1)
        return Quantized(rounded / (self.levels // 2), codes, bounded.new_zeros(()))

    def lookup(self, codes: Tensor) -> Tensor:
        """long [..] -> [.., dim]"""
        return ((codes[..., None] // self.bases) % self.levels - self.levels // 2) / (self.levels // 2)

    def after_step(self, step: int) -> None:
        """Nothing follows the data."""


def nearest(vectors: Tensor, codebook: Tensor) -> Tensor:
    """[n, d], [k, d] -> long [n]"""
    return (codebook.square().sum(dim=1) - 2 * F.linear(vectors, codebook)).argmin(dim=1)


def farthest(vectors: Tensor, count: int) -> Tensor:
    """[n, d] -> [count, d]: the vector farthest from the mean, then each time the one farthest from all before it.

    Greedy k-centre (Gonzalez 1985). Vectors are repeated where there are fewer.
    """
    distances = (vectors - vectors.mean(dim=0)).square().sum(dim=1)
    chosen = []
    for number in range(count):
        chosen.append(vectors[distances.argmax()])
        near = (vectors - chosen[-1]).square().sum(dim=1)
        distances = near if number == 0 else torch.minimum(distances, near)
    return torch.stack(chosen)
