"""Random shooting: the best of many random plans, each of piecewise constant actions."""

from __future__ import annotations

import torch
from torch import Tensor

from jepa.planning.sampling import best, uniform
from jepa.planning.types import Search
from jepa.types import PositiveInt


class RandomShooting:
    """The best of `samples` plans whose actions, uniform between the bounds, are held for `hold` steps."""

    def __init__(
        self, *, samples: PositiveInt = 768, horizon: PositiveInt = 16, execute: PositiveInt = 4, hold: PositiveInt = 4
    ) -> None:
        self.samples, self.horizon, self.execute, self.hold = samples, horizon, execute, hold

    def __call__(self, search: Search) -> Tensor:
        parts = -(-search.horizon // self.hold)
        drawn = 2 * uniform(search.generators, self.samples, parts, search.size) - 1
        candidates = drawn.repeat_interleave(self.hold, dim=2)[:, :, : search.horizon]
        if search.warm_start is not None:
            candidates = torch.cat([candidates, search.warm_start[:, None]], dim=1)
        return best(candidates, search.cost(candidates), 1)[:, 0]
