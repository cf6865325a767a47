"""Temporal masking: the context is the past of a clip, the targets are its future, one block for each time step."""

import torch
from torch import Tensor

from jepa.masks.geometry import TemporalGeometry
from jepa.masks.sampling import smallest, uniform_rows
from jepa.types import Masks, PatchGrid


class TemporalMasker:
    """Context [B, K] lies in time steps 0 ... s - 1, target block m of [B, M, J] in step s + m, m = 0 ... horizon - 1.

    A time step is one of the grid: a tubelet of frames, a single frame where the encoder works frame by frame. The
    split s is `split`, or drawn for each sample from `past` to the last one that leaves `horizon` steps; K is what the
    smallest split has, and a longer past is thinned at random over all of its space and time. `past` is half of the
    steps where it is not given: enough to see motion in, and no past is thinned to less than half. `ratio` is the share
    of each future step that is predicted, null all of it.
    """

    faults = "jepa.masks.geometry.temporal_faults"

    def __init__(
        self,
        *,
        grid: PatchGrid,
        horizon: int = 1,
        split: int | None = None,
        past: int | None = None,
        ratio: float | None = None,
    ):
        geometry = TemporalGeometry(grid=grid, horizon=horizon, split=split, past=past, ratio=ratio)
        if faults := geometry.faults():
            raise ValueError("; ".join(faults))
        self.grid = grid
        self.horizon = horizon
        self.splits = geometry.splits()
        self.num_context = geometry.num_context()
        self.num_targets = geometry.num_targets()

    def __call__(self, batch_size: int, generator: torch.Generator, rows: Tensor | None = None) -> Masks:
        """Draws one row of numbers for each sample, of which `rows` [b], ascending, become masks; without them all."""
        draws = uniform_rows(batch_size, 1 + self.grid.num_tokens, generator, rows)
        split = self.splits.start + (draws[:, :1] * len(self.splits)).long()  # [B, 1]
        keys, step = draws[:, 1:], torch.arange(self.grid.num_tokens) // (self.grid.h * self.grid.w)
        return Masks(smallest(keys + (step >= split), self.num_context), self._future(keys, split))

    def _future(self, keys: Tensor, split: Tensor) -> Tensor:
        """[B, N], [B, 1] -> [B, M, J] long: the tokens with the smallest keys of each step from the split on."""
        num_patches = self.grid.h * self.grid.w
        first = ((split + torch.arange(self.horizon)) * num_patches).unsqueeze(2)  # [B, M, 1]
        tokens = first + torch.arange(num_patches)  # [B, M, h * w]
        if self.num_targets == num_patches:
            return tokens
        chosen = smallest(
            keys.gather(1, tokens.flatten(1)).unflatten(1, tokens.shape[1:]).flatten(0, 1), self.num_targets
        )
        return first + chosen.unflatten(0, tokens.shape[:2])
