"""Random numbers and statistics of candidates, for each episode by itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from jepa.planning.types import Search


def normal(generators: Sequence[Generator], *shape: int) -> Tensor:
    """[B, *shape], each row from its own generator"""
    return torch.stack([torch.randn(*shape, generator=generator) for generator in generators])


def uniform(generators: Sequence[Generator], *shape: int) -> Tensor:
    """[B, *shape] in [0, 1)"""
    return torch.stack([torch.rand(*shape, generator=generator) for generator in generators])


def coloured(generators: Sequence[Generator], beta: float, *shape: int) -> Tensor:
    """Standard normal numbers [B, *shape] whose power falls as frequency^-beta along the last but one dimension, H.

    Timmer and Koenig 1995, as used by iCEM (Pinneri et al. 2020).
    """
    steps = shape[-2]
    frequencies = torch.fft.rfftfreq(steps)
    frequencies[0] = frequencies[1] if steps > 1 else 1.0
    scale = frequencies ** (-beta / 2)
    spectrum = torch.fft.rfft(normal(generators, *shape), dim=-2) * scale[:, None]
    power = torch.cat([scale[:1], scale[1:].repeat_interleave(2)])[:steps].square().mean().sqrt()
    return torch.fft.irfft(spectrum, n=steps, dim=-2) / power


def begin(search: Search) -> Tensor:
    """The mean of the first distribution [B, H, A]: the warm start, else zeros."""
    shape = (len(search.generators), search.horizon, search.size)
    return torch.zeros(shape) if search.warm_start is None else search.warm_start


def best(candidates: Tensor, costs: Tensor, count: int) -> Tensor:
    """[B, N, H, A], [B, N] -> the `count` candidates of least cost, best first: [B, count, H, A]"""
    rows = costs.topk(count, dim=1, largest=False).indices
    return candidates.gather(1, rows[:, :, None, None].expand(-1, -1, *candidates.shape[2:]))
