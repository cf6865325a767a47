"""Random numbers for each sample of a batch, and the choice of the same number of tokens in every sample by them."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from jepa.types import PatchGrid


def uniform_rows(batch_size: int, num_numbers: int, generator: torch.Generator, rows: Tensor | None = None) -> Tensor:
    """-> [batch_size, num_numbers] in [0, 1), of which `rows` [b] selects [b, num_numbers].

    All rows are drawn in any case, so that the generator ends in the same state.
    """
    numbers = torch.rand(batch_size, num_numbers, generator=generator)
    return numbers if rows is None else numbers[rows]


def smallest(scores: Tensor, num_tokens: int) -> Tensor:
    """[B, N] -> [B, num_tokens] long: indices of the smallest scores of each row, ascending."""
    values = scores.numpy()  # NumPy's partition and flatnonzero are several times as fast as topk and sort
    limits = np.partition(values, num_tokens - 1, axis=1)[:, num_tokens - 1, None]
    return _indices(values <= limits, values, slice(num_tokens))


def smallest_and_largest(scores: Tensor, num_first: int, num_last: int) -> tuple[Tensor, Tensor]:
    """[B, N] -> [B, num_first], [B, num_last] long: indices of the smallest and of the largest scores of each row.

    Both are ascending, and disjoint also among equal scores: num_first + num_last <= N.
    """
    values = scores.numpy()
    first_of_last = values.shape[1] - num_last
    parted = np.partition(values, num_first - 1, axis=1)  # one call with both limits is far slower
    rest = np.partition(parted[:, num_first:], first_of_last - num_first, axis=1)
    lower, upper = parted[:, num_first - 1, None], rest[:, first_of_last - num_first, None]
    return (
        _indices(values <= lower, values, slice(num_first)),
        _indices(values >= upper, values, slice(first_of_last, None)),
    )


def _indices(chosen: NDArray[np.bool_], values: NDArray[Any], ranks: slice) -> Tensor:
    """[B, N] bool -> [B, n] long: indices of the True entries, at the values of the n `ranks` or equal to one of them.

    A row with too many, because values at the limit are equal, is reduced to its ranks; among equal values the lower
    index has the lower rank.
    """
    num_chosen = len(range(*ranks.indices(chosen.shape[1])))
    if np.count_nonzero(chosen) > len(chosen) * num_chosen:
        crowded = np.flatnonzero(chosen.sum(axis=1) > num_chosen)
        chosen[crowded] = False
        chosen[crowded[:, None], values[crowded].argsort(axis=1, kind="stable")[:, ranks]] = True
    indices = np.flatnonzero(chosen).reshape(len(chosen), num_chosen)
    return torch.from_numpy(indices - np.arange(len(chosen))[:, None] * chosen.shape[1])


def repeat_over_time(patches: Tensor, grid: PatchGrid) -> Tensor:
    """[..., P] -> [..., t * P] long: token indices of the patches `patches` of one frame in every time step."""
    first = torch.arange(grid.t)[:, None] * (grid.h * grid.w)
    return (patches.unsqueeze(-2) + first).flatten(-2)
