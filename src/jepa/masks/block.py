"""Multi-block masking: several target blocks are predicted from one large context block (I-JEPA, section 3)."""

import torch
from torch import Tensor

from jepa.masks.geometry import BlockGeometry, Shape
from jepa.masks.sampling import repeat_over_time, smallest, uniform_rows
from jepa.types import Masks, PatchGrid

ATTEMPTS = 4
"""Number of placements drawn for each sample; the first that leaves enough context is used."""


class BlockMasker:
    """Target blocks [B, M, J] are full rectangles of one shape per batch; the context [B, K] avoids them all.

    In a clip a block covers all time steps, and the context is thinned at random over space and time. K follows from
    the configuration alone, and a sample's masks do not depend on the batch size. With `ratio=None` K is the number of
    tokens that the blocks usually leave free (`BlockGeometry.num_context`).
    """

    faults = "jepa.masks.geometry.block_faults"

    def __init__(
        self, *, grid: PatchGrid, ratio: float | None = 0.75, num_targets: int = 4,
        target_scale: tuple[float, float] = (0.15, 0.2), target_aspect: tuple[float, float] = (0.75, 1.5),
        context_scale: tuple[float, float] = (0.85, 1.0),
    ):  # fmt: skip
        geometry = BlockGeometry(
            grid=grid, ratio=ratio, num_targets=num_targets, target_scale=target_scale, target_aspect=target_aspect,
            context_scale=context_scale,
        )  # fmt: skip
        if faults := geometry.faults():
            raise ValueError("; ".join(faults))
        self.grid = grid
        self.num_targets = num_targets
        self.num_context = geometry.num_context()
        self.target_shapes = geometry.target_shapes()
        self.context_shapes = geometry.context_shapes()

    def __call__(self, batch_size: int, generator: torch.Generator, rows: Tensor | None = None) -> Masks:
        """Draws the shapes, then one row of numbers for each sample; returns the masks of `rows` [b] (default: all)."""
        which_target, which_context = torch.rand(2, generator=generator).tolist()
        target = self.target_shapes[int(which_target * len(self.target_shapes))]
        context = self.context_shapes[int(which_context * len(self.context_shapes))]

        num_corners = ATTEMPTS * (self.num_targets + 1) * 2
        draws = uniform_rows(batch_size, num_corners + self.grid.num_tokens, generator, rows)
        tries = draws[:, :num_corners].unflatten(1, (ATTEMPTS, self.num_targets + 1, 2))
        target_corners = self._corners(tries[:, :, 1:], target)  # [B, attempts, M, 2]
        context_corners = self._corners(tries[:, :, 0], context)  # [B, attempts, 2]

        corners, distance = self._place(target_corners, context_corners, target, context)
        context_tokens = smallest(draws[:, num_corners:] + distance.repeat(1, self.grid.t), self.num_context)
        return Masks(context_tokens, repeat_over_time(self._patches(corners, target), self.grid))

    def _corners(self, draws: Tensor, shape: Shape) -> Tensor:
        """[..., 2] in [0, 1) -> [..., 2] long: upper left corner, uniform over all that keep the block on the grid"""
        return (draws * torch.tensor([self.grid.h - shape[0] + 1, self.grid.w - shape[1] + 1])).long()

    def _place(self, targets: Tensor, contexts: Tensor, target: Shape, context: Shape) -> tuple[Tensor, Tensor]:
        """[B, attempts, M, 2], [B, attempts, 2] -> corners [B, M, 2], distance [B, h * w].

        The distance of a patch from the context is 0 in the context block, 1 around it and 2 in a target. If no attempt
        leaves K tokens at distance 0, the context also takes tokens around its block; if those are too few as well, one
        target block after another moves onto the first.
        """
        corners = targets[:, 0].clone()
        distance = self._distance(corners, contexts[:, 0], target, context)
        for attempt in range(1, ATTEMPTS):
            short = self._short(distance, below=1)
            if not len(short):
                return corners, distance
            corners[short] = targets[short, attempt]
            distance[short] = self._distance(corners[short], contexts[short, attempt], target, context)
        for block in range(self.num_targets - 1, 0, -1):
            short = self._short(distance, below=2)
            if not len(short):
                break
            corners[short, block] = corners[short, 0]
            distance[short] = self._distance(corners[short], contexts[short, -1], target, context)
        return corners, distance

    def _short(self, distance: Tensor, below: int) -> Tensor:
        """[B, h * w] -> [b]: samples with fewer than K tokens at distances less than `below`."""
        return ((distance < below).sum(1) * self.grid.t < self.num_context).nonzero().squeeze(1)

    def _distance(self, targets: Tensor, contexts: Tensor, target: Shape, context: Shape) -> Tensor:
        """[b, M, 2], [b, 2] -> [b, h * w]: 0 in the context block, 1 around it, 2 in a target block"""
        distance = torch.ones(len(targets), self.grid.h * self.grid.w)
        distance.scatter_(1, self._patches(contexts, context), 0.0)
        return distance.scatter_(1, self._patches(targets, target).flatten(1), 2.0)

    def _patches(self, corners: Tensor, shape: Shape) -> Tensor:
        """[..., 2] -> [..., height * width] long: indices of the patches of a block in one frame, ascending"""
        first = corners[..., 0] * self.grid.w + corners[..., 1]
        offsets = torch.arange(shape[0]).unsqueeze(1) * self.grid.w + torch.arange(shape[1])
        return first.unsqueeze(-1) + offsets.flatten()
