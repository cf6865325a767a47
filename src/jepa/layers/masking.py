"""Choosing tokens at random, the same number in every row."""

from torch import Tensor


def pick(keys: Tensor, num_tokens: int) -> Tensor:
    """[B, N] -> [B, num_tokens] long: the places of the smallest keys of each row, in raster order."""
    return keys.topk(num_tokens, dim=1, largest=False, sorted=False).indices.sort(dim=1).values
