"""Linear probe: multinomial logistic regression on frozen features, solved to convergence instead of trained."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from jepa.evaluation.probe import (
    SELECTION_SHARE,
    ClassProbe,
    ProbePrediction,
    ProbeTask,
    selection_split,
    standardise,
    top1,
)
from jepa.evaluation.types import Features
from jepa.types import Readout

L2_GRID = (1.0, 0.1, 0.01, 1e-3, 1e-4, 1e-5, 1e-6)
"""L2 weights from strong to weak: each solution is a good start for the next."""
PATIENCE = 2
"""Weaker L2 weights in a row without an improvement that end the search."""
MIN_CURVATURE = 1e-5
ROUNDING = 4 * torch.finfo(torch.float32).eps
"""Of the sum of all curvatures: what rounding may take from the smallest of them."""


class LinearModel(NamedTuple):
    weight: Tensor
    """[classes, D]"""
    bias: Tensor
    """[classes]"""


class LinearProbe(ClassProbe):
    """Logistic regression whose L2 weight is chosen on a fifth of the training samples."""

    def __init__(self, *, readout: Readout = "mean") -> None:
        protocol = (
            "linear: logistic regression on features standardised by the training samples, solved by L-BFGS; "
            f"L2 weight chosen from {L2_GRID[0]:g}, {L2_GRID[1]:g} ... {L2_GRID[-1]:g} on {SELECTION_SHARE:.0%} of the "
            "training samples, then fitted on all"
        )
        super().__init__(name="linear", protocol=protocol, readout=readout)

    def predict(self, task: ProbeTask) -> ProbePrediction:
        train, val = in_row_space(*standardise(task.train, task.val, task.device))
        l2, start = select_l2(train, num_classes=task.num_classes, seed=task.seed)
        model = fit_logistic(train.vectors, train.labels, num_classes=task.num_classes, l2=l2, start=start)
        logits = F.linear(val.vectors, *model).cpu()
        return ProbePrediction(logits.argmax(1), {"l2": l2}, logits.softmax(1))


def in_row_space(train: Features, val: Features) -> tuple[Features, Features]:
    """The same samples in an orthonormal basis of the training samples if these have more dimensions than samples.

    The weights of least L2 norm lie in that space (the representer theorem), so that nothing is lost.
    """
    if train.vectors.shape[1] <= len(train.vectors):
        return train, val
    basis = torch.linalg.svd(train.vectors, full_matrices=False).Vh.mT  # [D, n]
    projected = [Features(part.vectors @ basis, part.labels, part.targets) for part in (train, val)]
    return projected[0], projected[1]


def select_l2(train: Features, *, num_classes: int, seed: int = 0) -> tuple[float, LinearModel]:
    """The L2 weight with the best accuracy on the selection samples (the stronger one of equals), and its solution."""
    fitted, selection = selection_split(train, seed)
    vectors, labels = fitted.vectors, fitted.labels
    second_moment = vectors.T @ vectors / len(vectors)
    trials: list[tuple[float, float, LinearModel]] = []
    best, model = 0, None
    for l2 in L2_GRID:
        model = fit_logistic(vectors, labels, num_classes=num_classes, l2=l2, start=model, second_moment=second_moment)
        predicted = F.linear(selection.vectors, *model).argmax(1)
        trials.append((top1(predicted, selection.labels), l2, model))
        best = max(range(len(trials)), key=lambda index: trials[index][0])
        if len(trials) - 1 - best >= PATIENCE:
            break
    return trials[best][1:]


def fit_logistic(
    vectors: Tensor, labels: Tensor, *, num_classes: int, l2: float, start: LinearModel | None = None,
    second_moment: Tensor | None = None, max_iterations: int = 100, tolerance: float = 1e-4,
) -> LinearModel:  # fmt: skip
    """[n, D], [n] -> the minimum of mean cross-entropy + l2 / 2 |weight|^2; sklearn's C is 1 / (n l2).

    Features of an encoder are so ill-conditioned that L-BFGS converges only on weight @ factor, where factor factor^T
    is the curvature at weight 0, bounded below since a weak l2 would make it singular in float32.
    """
    num, dim = vectors.shape
    identity = torch.eye(dim, dtype=vectors.dtype, device=vectors.device)
    curvature = (vectors.T @ vectors / num if second_moment is None else second_moment) / num_classes
    least = max(l2, MIN_CURVATURE, ROUNDING * float(curvature.trace()))
    factor = torch.linalg.cholesky(curvature + least * identity)
    inverse = torch.linalg.solve_triangular(factor, identity, upper=False)
    if start is None:
        start = LinearModel(vectors.new_zeros(num_classes, dim), vectors.new_zeros(num_classes))
    solution, bias = (start.weight @ factor).requires_grad_(), start.bias.clone().requires_grad_()
    solver = torch.optim.LBFGS(
        [solution, bias], max_iter=max_iterations, tolerance_grad=tolerance, tolerance_change=tolerance / 100,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def objective() -> Tensor:
        solver.zero_grad()
        weight = solution @ inverse
        loss = F.cross_entropy(F.linear(vectors, weight, bias), labels) + 0.5 * l2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(objective)
    return LinearModel(solution.detach() @ inverse, bias.detach())
