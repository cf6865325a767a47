"""One optimizer step: the only code between two batches that touches the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from jepa.parallel.collectives import mean_over_ranks
from jepa.parallel.strategy import accumulating, whole
from jepa.training.gradient_cache import JointPenalty, Penalty
from jepa.types import Batch, LossOutput, Masks


class StepOutput(NamedTuple):
    """Float32 scalars on the device; nothing here waits for it."""

    loss: Tensor
    grad_norm: Tensor
    skipped: Tensor
    """1 where the step was not taken, else 0"""
    metrics: dict[str, Tensor]


class SpikeGuard(nn.Module):
    """Refuses a step whose loss exceeds the mean of the recent ones by more than `num_std` standard deviations.

    The loss-spike guard of V-JEPA 2.1; it looks at the last 300 accepted losses and stays silent for the first 30.
    """

    WINDOW, MINIMUM = 300, 30

    def __init__(self, *, num_std: float) -> None:
        super().__init__()
        self.num_std = num_std
        self.register_buffer("losses", torch.zeros(self.WINDOW))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    losses: Tensor
    count: Tensor

    def forward(self, loss: Tensor) -> Tensor:
        """[] -> [] bool: whether the step may be taken; remembers the loss if so."""
        known = torch.arange(self.WINDOW, device=loss.device) < self.count
        number = known.sum().clamp(min=2)
        mean = (self.losses * known).sum() / number
        deviation = (((self.losses - mean) ** 2 * known).sum() / (number - 1)).sqrt()
        accepted = (self.count < self.MINIMUM) | (loss <= mean + self.num_std * deviation)
        accepted = accepted & loss.isfinite()
        slot = self.count % self.WINDOW
        self.losses[slot] = torch.where(accepted, loss, self.losses[slot])
        self.count += accepted
        return accepted


def train_step(
    objective: nn.Module,
    optimizer: Optimizer,
    batch: Batch,
    masks: Masks,
    *,
    micro_batch_size: int,
    autocast: Callable[[], AbstractContextManager],
    clip_grad: float | None,
    guard: SpikeGuard | None,
    seed: int,
    penalty: Penalty | None = None,
) -> StepOutput:
    """Gradients of the whole batch in pieces of `micro_batch_size` samples, clipped, and one step if all is finite.

    `batch` is this rank's part of it. `penalty` is the objective's, where it has regularisers: they see all pieces.
    """
    pieces = list(_pieces(batch, masks, micro_batch_size))
    shares = [len(piece.clips) / len(batch.clips) for piece, _ in pieces]
    joint = None
    if penalty is not None and len(pieces) > 1:
        joint = _first_pass(objective, pieces, autocast, penalty, seed)
    torch.manual_seed(seed)
    outputs = []
    for number, (piece, piece_masks) in enumerate(pieces):
        is_last = number + 1 == len(pieces)
        if joint is not None:
            joint.piece = number
        with nullcontext() if is_last else accumulating(objective):
            outputs.append(_accumulate(objective, piece, piece_masks, joint, shares[number], autocast))
    loss = mean_over_ranks(_weighted([output.loss for output in outputs], shares))
    metrics = {name: _weighted([o.metrics[name] for o in outputs], shares) for name in outputs[0].metrics}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    grad_norm = whole(nn.utils.clip_grad_norm_(parameters, float("inf") if clip_grad is None else clip_grad))
    accepted = loss.isfinite() & grad_norm.isfinite()
    if guard is not None:
        accepted = accepted & guard(loss)
    skipped = 1.0 - accepted.float()
    _step(optimizer, skipped)
    optimizer.zero_grad(set_to_none=True)
    return StepOutput(loss=loss, grad_norm=grad_norm, skipped=skipped, metrics=metrics)


def _pieces(batch: Batch, masks: Masks, size: int) -> Iterator[tuple[Batch, Masks]]:
    """Of `size` samples each, with all their views."""
    for start in range(0, len(batch.clips) // batch.views, size):
        rows = slice(start * batch.views, (start + size) * batch.views)
        yield batch.rows(start, size), masks.map(lambda m, rows=rows: m[rows])


@torch.no_grad()
def _first_pass(
    objective: nn.Module,
    pieces: list[tuple[Batch, Masks]],
    autocast: Callable[[], AbstractContextManager],
    penalty: Penalty,
    seed: int,
) -> JointPenalty:
    """The regularisers of all pieces; dropped paths are drawn as in the second pass."""
    joint = JointPenalty(len(pieces))
    torch.manual_seed(seed)
    for joint.piece, (piece, masks) in enumerate(pieces):
        with autocast():
            objective(piece, masks, joint)
    torch.manual_seed(seed)
    with torch.enable_grad():
        joint.solve(penalty)
    return joint


def _accumulate(
    objective: nn.Module,
    batch: Batch,
    masks: Masks,
    joint: JointPenalty | None,
    share: float,
    autocast: Callable[[], AbstractContextManager],
) -> LossOutput:
    with autocast():
        output: LossOutput = objective(batch, masks) if joint is None else objective(batch, masks, joint)
    (output.loss * share).backward()
    return output._replace(loss=output.loss.detach())


def _weighted(values: list[Tensor], shares: list[float]) -> Tensor:
    return torch.stack([share * value for share, value in zip(shares, values, strict=True)]).sum()


def _step(optimizer: Optimizer, skipped: Tensor) -> None:
    """Fused optimizers read the flag on the device; others need the host to look at it."""
    if optimizer.defaults.get("fused"):
        vars(optimizer).update(grad_scale=None, found_inf=skipped)
        optimizer.step()
    elif not skipped:
        optimizer.step()
