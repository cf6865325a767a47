"""Choosing tokens at random, the same number in every row."""

import numpy as np
import torch
from torch import Tensor

from jepa.types import PatchGrid


def pick(keys: Tensor, num_tokens: int) -> Tensor:
    """[B, N] -> [B, num_tokens] long: the places of the smallest keys of each row, in raster order."""
    values = keys.numpy()  # partition and flatnonzero are several times as fast as topk and sort
    chosen = values <= np.partition(values, num_tokens - 1, axis=1)[:, num_tokens - 1 : num_tokens]
    crowded = np.flatnonzero(chosen.sum(axis=1) > num_tokens)  # rows with equal keys at the limit
    if len(crowded):
        chosen[crowded] = False
        smallest = keys[crowded].topk(num_tokens, dim=1, largest=False, sorted=False).indices.numpy()
        chosen[crowded[:, None], smallest] = True
    places = np.flatnonzero(chosen).reshape(len(values), num_tokens)
    return torch.from_numpy(places - np.arange(len(values))[:, None] * values.shape[1])


def through_time(patches: Tensor, grid: PatchGrid) -> Tensor:
    """[..., P] -> [..., t * P] long: the tokens that patches of one frame have in all time steps."""
    first = torch.arange(grid.t)[:, None] * (grid.h * grid.w)
    return (patches.unsqueeze(-2) + first).flatten(-2)
