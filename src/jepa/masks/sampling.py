"""Random numbers for each row of a batch, and choosing tokens by them, the same number in every row."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from jepa.types import PatchGrid


def uniform_rows(batch_size: int, num_numbers: int, generator: torch.Generator, rows: Tensor | None = None) -> Tensor:
    """[b] ascending -> [b, num_numbers]: these rows of `torch.rand(batch_size, num_numbers)`, without `rows` all.

    The generator ends in the same state whichever rows are asked for. A Mersenne Twister can only walk past what lies
    between them, in NumPy twice as fast as in torch and without memory.
    """
    if rows is None:
        return torch.rand(batch_size, num_numbers, generator=generator)
    state = generator.get_state()
    words = state.numpy().view(np.uint64)  # the seed, how many of the 624 are left, the next one, and themselves
    left = state.numpy()[8:12].view(np.int32)
    source = np.random.MT19937(0)
    source.state = {"bit_generator": "MT19937", "state": {"key": words[3:627].astype(np.uint32), "pos": 625 - left[0]}}
    numbers, passed = np.empty((len(rows), num_numbers), dtype=np.float32), 0
    for place, row in enumerate(rows.tolist()):
        source.random_raw((row - passed) * num_numbers, output=False)
        numbers[place] = source.random_raw(num_numbers) & 0xFFFFFF  # of a word torch takes 24 bits
        passed = row + 1
    source.random_raw((batch_size - passed) * num_numbers, output=False)
    words[3:627], words[2] = source.state["state"]["key"], source.state["state"]["pos"]
    left[0] = 625 - words[2]
    generator.set_state(state)
    return torch.from_numpy(numbers * np.float32(2**-24))


def smallest(scores: Tensor, num_tokens: int) -> Tensor:
    """[B, N] -> [B, num_tokens] long: the places of the smallest keys of each row, in raster order."""
    values = scores.numpy()  # partition and flatnonzero are several times as fast as topk and sort
    limits = np.partition(values, num_tokens - 1, axis=1)[:, num_tokens - 1, None]
    return _indices(values <= limits, values, slice(num_tokens))


def smallest_and_largest(scores: Tensor, num_first: int, num_last: int) -> tuple[Tensor, Tensor]:
    """[B, N] -> [B, num_first], [B, num_last] long: of each row the places of the smallest and of the largest keys.

    Both are in raster order and have no place in common: num_first + num_last <= N.
    """
    values = scores.numpy()
    first_of_last = values.shape[1] - num_last
    parted = np.partition(values, num_first - 1, axis=1)  # asked for both limits at once, NumPy is far slower
    rest = np.partition(parted[:, num_first:], first_of_last - num_first, axis=1)
    lower, upper = parted[:, num_first - 1, None], rest[:, first_of_last - num_first, None]
    return (
        _indices(values <= lower, values, slice(num_first)),
        _indices(values >= upper, values, slice(first_of_last, None)),
    )


def _indices(chosen: NDArray[np.bool_], values: NDArray[Any], ranks: slice) -> Tensor:
    """[B, N] bool -> [B, n]: where it is true, which is at the values of the n `ranks` or of their equals.

    Rows that equals at the limit have made too long keep the ranks alone, of equals the first place being the lowest.
    """
    num_chosen = len(range(*ranks.indices(chosen.shape[1])))
    if np.count_nonzero(chosen) > len(chosen) * num_chosen:
        crowded = np.flatnonzero(chosen.sum(axis=1) > num_chosen)
        chosen[crowded] = False
        chosen[crowded[:, None], values[crowded].argsort(axis=1, kind="stable")[:, ranks]] = True
    places = np.flatnonzero(chosen).reshape(len(chosen), num_chosen)
    places -= np.arange(len(chosen))[:, None] * chosen.shape[1]
    return torch.from_numpy(places)


def repeat_over_time(patches: Tensor, grid: PatchGrid) -> Tensor:
    """[..., P] -> [..., t * P] long: the tokens that patches of one frame have in all time steps."""
    first = torch.arange(grid.t)[:, None] * (grid.h * grid.w)
    return (patches.unsqueeze(-2) + first).flatten(-2)
