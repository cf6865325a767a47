"""A distance between the states of a world, in steps: straight through walls, blind to errors of the prediction."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from jepa.planning.heads import Recordings

LEAST_RATIO = 0.5
"""Least ratio of steps to errors in a direction that counts, as a share of the largest ratio."""
RIDGE = 1e-3
"""Added to the covariance of errors, as a share of its mean variance."""


class Metric(nn.Module):
    """Places of states, [.., D] -> [.., k]; the distance of two places is 1 for a step of median length."""

    directions: Tensor

    def __init__(self, state_size: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("directions", torch.zeros(state_size, size))

    def forward(self, states: Tensor) -> Tensor:
        return states @ self.directions


def fit_metric(data: Recordings) -> tuple[Metric, float]:
    """The metric of recordings, and the largest ratio of steps to errors.

    Its directions are those in which steps differ most over the errors of predictions of one step: the eigenvectors of
    the covariance of steps over that of errors (as in a linear discriminant analysis). In all directions together every
    imagined state would be new, since most of them hold little but errors.
    """
    assert data.predicted is not None
    rows = data.transitions
    rows = rows[rows - torch.searchsorted(data.ends, data.ends[rows]) >= data.history - 1]  # others are not predicted
    parts = data.states[rows], data.states[rows + 1], data.predicted[rows + 1]
    before, after, predicted = (part.double() for part in parts)
    steps, errors = ((part.mT @ part) / len(part) for part in (after - before, predicted - after))
    errors = errors + RIDGE * errors.diagonal().mean() * torch.eye(len(errors)).double()
    root = torch.linalg.cholesky(errors)
    half = torch.linalg.solve_triangular(root, steps, upper=False)
    ratios, vectors = torch.linalg.eigh(torch.linalg.solve_triangular(root, half.mT, upper=False))
    kept = ratios >= LEAST_RATIO * ratios[-1]
    directions = torch.linalg.solve_triangular(root.mT, vectors[:, kept].flip(1), upper=True)
    length = ((after - before) @ directions).norm(dim=1).median()
    metric = Metric(len(directions), directions.shape[1])
    metric.directions.copy_(directions / length)
    return metric.requires_grad_(False).eval(), ratios[-1].item()
