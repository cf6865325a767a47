"""Random numbers for each row of a batch, and choosing tokens by them, the same number in every row."""

import numpy as np
import torch
from torch import Tensor

from jepa.types import PatchGrid


def draw(batch_size: int, num_numbers: int, generator: torch.Generator, rows: Tensor | None = None) -> Tensor:
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
