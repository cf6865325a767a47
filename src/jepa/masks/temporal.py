"""Temporal masking: the context is the past of a clip, the targets are its future, one block for each time step."""

import torch
from torch import Tensor

from jepa.masks.geometry import TemporalGeometry
from jepa.masks.sampling import smallest, uniform_rows
from jepa.types import Masks, PatchGrid


class TemporalMasker:
    """Context [B, K] lies in time steps 0 ... s - 1, target block m of [B, M, J] in step s + m, m = 0 ... horizon - 1.

    A time step is one of the grid: a tubelet, or a frame if the encoder works frame by frame. The split s is `split`,
    or drawn for each sample from `past` to the last one that leaves `horizon` steps. K is the number of tokens before
    the smallest split; a longer past is thinned at random over space and time. By default `past` is half of the steps,
    which is enough to show motion, and thins no past to less than half. `ratio` is the share of each future step that
    is predicted; null predicts all of it.
    """

    faults = "jepa.masks.geometry.temporal_faults"

    def __init__(
        self, *, grid: PatchGrid, horizon: int = 1, split: int | None = None, past: int | None = None,
        ratio: float | None = None,
    ):  # fmt: skip
        geometry = TemporalGeometry(grid=grid, horizon=horizon, split=split, past=past, ratio=ratio)
        if faults := geometry.faults():
            raise ValueError("; ".join(faults))
        self.grid = grid
        self.horizon = horizon
        self.splits = geometry.splits()
        self.num_context = geometry.num_context()
        self.num_targets = geometry.num_targets()

    def __call__(self, batch_size: int, generator: torch.Generator, rows: Tensor | None = None) -> Masks:
        """Draws one row of numbers for each sample; returns the masks of `rows` [b] (default: all)."""
        draws = uniform_rows(batch_size, 1 + self.grid.num_tokens, generator, rows)
        split = self.splits.start + (draws[:, :1] * len(self.splits)).long()  # [B, 1]
        scores, step = draws[:, 1:], torch.arange(self.grid.num_tokens) // (self.grid.h * self.grid.w)
        return Masks(smallest(scores + (step >= split), self.num_context), self._future(scores, split))

    def _future(self, scores: Tensor, split: Tensor) -> Tensor:
        """[B, N], [B, 1] -> [B, M, J] long: the tokens with the smallest scores in each step from the split on."""
        num_patches = self.grid.h * self.grid.w
        first = ((split + torch.arange(self.horizon)) * num_patches).unsqueeze(2)  # [B, M, 1]
        tokens = first + torch.arange(num_patches)  # [B, M, h * w]
        if self.num_targets == num_patches:
            return tokens
        chosen = smallest(scores.gather(1, tokens.flatten(1)).reshape(-1, num_patches), self.num_targets)
        return first + chosen.unflatten(0, tokens.shape[:2])
