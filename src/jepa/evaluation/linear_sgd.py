"""Linear probe by SGD (Caron et al. 2021, appendix; Bardes et al. 2024), all heads of a grid on the same batches.

Features are standardised by the training samples, which is batch norm without learned scale and shift.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from jepa.evaluation.probe import SELECTION_SHARE, ClassProbe, ProbePrediction, ProbeTask, selection_split, standardise
from jepa.evaluation.types import Features
from jepa.schedules import cosine
from jepa.types import NonNegative, Positive, PositiveInt, Readout

MOMENTUM = 0.9
CHUNK = 4096
"""Samples whose logits are computed at once."""


class Heads(NamedTuple):
    """H linear heads side by side."""

    weight: Tensor
    """[H, classes, D]"""
    bias: Tensor
    """[H, classes]"""

    def logits(self, vectors: Tensor) -> Tensor:
        """[b, D] -> [H, b, classes]"""
        return torch.einsum("hcd,bd->hbc", self.weight, vectors) + self.bias[:, None]


class SGDProbe(ClassProbe):
    """Learning rate and weight decay are chosen on a fifth of the training samples, then one head is trained on all."""

    def __init__(
        self, *, epochs: PositiveInt, batch_size: PositiveInt, lrs: Sequence[Positive],
        weight_decays: Sequence[NonNegative], readout: Readout = "mean",
    ) -> None:  # fmt: skip
        if not lrs or not weight_decays:
            raise ValueError(f"evaluator.linear_sgd: lrs={lrs} and weight_decays={weight_decays} must not be empty")
        self.epochs = epochs
        self.batch_size = batch_size
        self.grid = list(product(lrs, weight_decays))
        rates, decays = (", ".join(f"{value:g}" for value in values) for values in (lrs, weight_decays))
        protocol = (
            f"linear, SGD: a linear layer on features standardised by the training samples, {epochs} epochs of SGD "
            f"(momentum {MOMENTUM}, batch {batch_size}, cosine schedule to 0); learning rate of {rates} and "
            f"weight decay of {decays} chosen on {SELECTION_SHARE:.0%} of the training samples, then trained on all"
        )
        super().__init__(name="linear_sgd", protocol=protocol, readout=readout)

    def predict(self, task: ProbeTask) -> ProbePrediction:
        train, val = standardise(task.train, task.val, task.device)
        fitted, selection = selection_split(train, task.seed)
        num_right = predict(self.fit(fitted, self.grid, task), selection.vectors).eq(selection.labels).sum(1)  # [H]
        lr, weight_decay = self.grid[int(num_right.argmax())]
        heads = self.fit(train, [(lr, weight_decay)], task)
        return ProbePrediction(predict(heads, val.vectors)[0].cpu(), {"lr": lr, "weight_decay": weight_decay})

    def fit(self, train: Features, grid: Sequence[tuple[float, float]], task: ProbeTask) -> Heads:
        """A head for each (lr, weight decay), initialised to zero, all on the same batches; pure in the seed.

        The gradient of softmax and cross-entropy is written out, so that each head has its own without a graph.
        """
        vectors, labels, classes = train.vectors, train.labels, task.num_classes
        generator = torch.Generator().manual_seed(task.seed)
        lrs, decays = torch.tensor(grid, dtype=vectors.dtype, device=vectors.device).unbind(1)
        weight = vectors.new_zeros(len(grid), classes, vectors.shape[1])
        bias = vectors.new_zeros(len(grid), classes)
        heads, velocity = Heads(weight, bias), Heads(torch.zeros_like(weight), torch.zeros_like(bias))
        num_batches, step = math.ceil(len(labels) / self.batch_size), 0
        for _ in range(self.epochs):
            for rows in torch.randperm(len(labels), generator=generator).chunk(num_batches):
                batch, targets = vectors[rows], F.one_hot(labels[rows], classes)
                error = (heads.logits(batch).softmax(2) - targets) / len(rows)  # [H, b, classes]
                gradients = Heads(torch.einsum("hbc,bd->hcd", error, batch), error.sum(1))
                rate = cosine(step, self.epochs * num_batches, 1.0, 0.0) * lrs
                for value, gradient, momentum in zip(heads, gradients, velocity, strict=True):
                    shape = (-1, *[1] * (value.ndim - 1))
                    momentum.mul_(MOMENTUM).add_(gradient).add_(decays.view(shape) * value)
                    value.sub_(rate.view(shape) * momentum)
                step += 1
        return heads


def predict(heads: Heads, vectors: Tensor) -> Tensor:
    """[n, D] -> [H, n]"""
    return torch.cat([heads.logits(chunk).argmax(2) for chunk in vectors.split(CHUNK)], dim=1)
