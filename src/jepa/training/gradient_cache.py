"""Regularisers of a batch that is computed in pieces, as if it were computed at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from jepa.types import Latents, Masks

Penalty = Callable[[Latents], tuple[Tensor, dict[str, Tensor]]]


class JointPenalty:
    """Takes the place of the regularisers in the objective's forward, in two passes over the pieces.

    Statistics of a batch do not add up over its pieces. The first pass, without gradients, keeps the latents; `solve`
    takes the penalty of all of them and its gradient; in the second pass each piece pulls its latents by its share of
    that gradient. Memory is that of one piece beside the latents (gradient caching, Gao et al. 2021, section 3.1).
    """

    def __init__(self, num_pieces: int) -> None:
        self.kept: list[list[Latents]] = [[] for _ in range(num_pieces)]
        self.told: list[tuple[Tensor, dict[str, Tensor], list[list[Tensor]]]] = []
        self.piece = 0

    @property
    def is_noting(self) -> bool:
        """Whether this is the first pass."""
        return not self.told

    @torch.compiler.disable
    def __call__(self, number: int, latents: Latents) -> tuple[Tensor, dict[str, Tensor]]:
        """Of mask set `number` of the current piece: the penalty of the whole batch, with this piece's gradient."""
        if self.is_noting:
            self.kept[self.piece].append(_map(latents, Tensor.detach))
            return latents.context.new_zeros((), dtype=torch.float32), {}
        value, terms, pulls = self.told[number]
        pairs = zip(_tensors(latents), pulls[self.piece], strict=True)
        pulled = torch.stack([(tensor.float() * pull).sum() for tensor, pull in pairs]).sum()
        return value + (pulled - pulled.detach()) / self._share(self.piece), terms

    def _share(self, piece: int) -> float:
        sizes = [len(latents[0].context) for latents in self.kept]
        return sizes[piece] / sum(sizes)

    def solve(self, penalty: Penalty) -> None:
        """The penalty over all pieces, for each mask set."""
        told = []
        for pieces in zip(*self.kept, strict=True):
            joined = _map(_join(pieces), lambda tensor: tensor.requires_grad_())
            leaves = _tensors(joined)
            value, terms = penalty(joined)
            found = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
            sizes = zip(*([len(tensor) for tensor in _tensors(piece)] for piece in pieces), strict=True)
            parts = (pull.float().split(list(size)) for pull, size in zip(found, sizes, strict=True))
            pulls = [list(part) for part in zip(*parts, strict=True)]
            told.append((value.detach(), terms, pulls))
        self.told = told


def _tensors(latents: Latents) -> list[Tensor]:
    local = [] if latents.local is None else _tensors(latents.local)
    return [latents.context, latents.predicted, *local]


def _map(latents: Latents, change: Callable[[Tensor], Tensor]) -> Latents:
    local = None if latents.local is None else _map(latents.local, change)
    return latents._replace(context=change(latents.context), predicted=change(latents.predicted), local=local)


def _join(pieces: tuple[Latents, ...] | list[Latents]) -> Latents:
    """The latents of all pieces, one after the other."""

    def together(pick: Callable[[Any], Tensor]) -> Tensor:
        return torch.cat([pick(piece) for piece in pieces])

    masks = Masks(together(lambda p: p.masks.context), together(lambda p: p.masks.targets))
    locals_ = [piece.local for piece in pieces if piece.local is not None]
    return pieces[0]._replace(
        context=together(lambda p: p.context), predicted=together(lambda p: p.predicted), masks=masks,
        local=_join(locals_) if locals_ else None,
    )  # fmt: skip
