"""One optimizer step: forward and backward passes of the micro-batches, clipping, the finite check, the update."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from jepa.parallel.collectives import mean_over_ranks
from jepa.parallel.strategy import full_tensor, no_grad_sync
from jepa.training.gradient_cache import GradCache
from jepa.types import Batch, LossOutput, Masks, Regularizer


class StepOutput(NamedTuple):
    """Float32 scalars on the device."""

    loss: Tensor
    grad_norm: Tensor
    skipped: Tensor
    """1 if the step was skipped, else 0."""
    metrics: dict[str, Tensor]


class SpikeGuard(nn.Module):
    """Skips a step whose loss is `num_std` standard deviations above the running mean (V-JEPA 2.1).

    The mean is that of the last 300 accepted losses; the guard is inactive for the first 30 steps.
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
        """[] -> [] bool: True if the step is accepted; its loss then enters the running mean."""
        filled = torch.arange(self.WINDOW, device=loss.device) < self.count
        number = filled.sum().clamp(min=2)
        mean = (self.losses * filled).sum() / number
        deviation = (((self.losses - mean) ** 2 * filled).sum() / (number - 1)).sqrt()
        accepted = (self.count < self.MINIMUM) | (loss <= mean + self.num_std * deviation)
        accepted = accepted & loss.isfinite()
        slot = self.count % self.WINDOW
        self.losses[slot] = torch.where(accepted, loss, self.losses[slot])
        self.count += accepted
        return accepted


def train_step(
    objective: nn.Module, optimizer: Optimizer, batch: Batch, masks: Masks, *, micro_batch_size: int,
    autocast: Callable[[], AbstractContextManager], clip_grad: float | None, guard: SpikeGuard | None, seed: int,
    penalty: Regularizer | None = None,
) -> StepOutput:  # fmt: skip
    """Accumulate the gradients of micro-batches of `micro_batch_size` samples, clip them, and step if all are finite.

    `batch` is this rank's part. `penalty` is the objective's `regularization`, taken over all micro-batches together.
    """
    micro_batches = list(_split(batch, masks, micro_batch_size))
    weights = [len(micro_batch.clips) / len(batch.clips) for micro_batch, _ in micro_batches]
    grad_caches = []
    if penalty is not None and len(micro_batches) > 1:
        grad_caches = [_first_pass(objective, micro_batches, autocast, penalty, seed)]
    torch.manual_seed(seed)
    outputs: list[LossOutput] = []
    for number, (micro_batch, its_masks) in enumerate(micro_batches):
        for grad_cache in grad_caches:
            grad_cache.index = number
        with nullcontext() if number + 1 == len(micro_batches) else no_grad_sync(objective):
            with autocast():
                output = objective(micro_batch, its_masks, *grad_caches)
            (output.loss * weights[number]).backward()
        outputs.append(output._replace(loss=output.loss.detach()))
    loss = mean_over_ranks(_weighted_sum([output.loss for output in outputs], weights))
    metrics = {name: _weighted_sum([o.metrics[name] for o in outputs], weights) for name in outputs[0].metrics}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    grad_norm = full_tensor(nn.utils.clip_grad_norm_(parameters, float("inf") if clip_grad is None else clip_grad))
    accepted = loss.isfinite() & grad_norm.isfinite()
    if guard is not None:
        accepted = accepted & guard(loss)
    skipped = 1.0 - accepted.float()
    _step(optimizer, skipped)
    optimizer.zero_grad(set_to_none=True)
    return StepOutput(loss=loss, grad_norm=grad_norm, skipped=skipped, metrics=metrics)


def _split(batch: Batch, masks: Masks, size: int) -> Iterator[tuple[Batch, Masks]]:
    """Micro-batches of `size` samples with all their views, and their masks."""
    for start in range(0, len(batch.clips) // batch.views, size):
        rows = slice(start * batch.views, (start + size) * batch.views)
        yield batch.rows(start, size), masks.map(lambda m, rows=rows: m[rows])


@torch.no_grad()
def _first_pass(
    objective: nn.Module, micro_batches: list[tuple[Batch, Masks]], autocast: Callable[[], AbstractContextManager],
    penalty: Regularizer, seed: int,
) -> GradCache:  # fmt: skip
    """The cached penalty of all micro-batches; dropout and dropped paths are those of the second pass."""
    grad_cache = GradCache(len(micro_batches))
    torch.manual_seed(seed)
    for grad_cache.index, (micro_batch, masks) in enumerate(micro_batches):
        with autocast():
            objective(micro_batch, masks, grad_cache)
    torch.manual_seed(seed)
    with torch.enable_grad():
        grad_cache.compute(penalty)
    return grad_cache


def _weighted_sum(values: list[Tensor], weights: list[float]) -> Tensor:
    return torch.stack([weight * value for weight, value in zip(weights, values, strict=True)]).sum()


def _step(optimizer: Optimizer, skipped: Tensor) -> None:
    """Step unless `skipped`; fused optimizers read the flag on the device, for others the host waits for it."""
    if optimizer.defaults.get("fused"):
        vars(optimizer).update(grad_scale=None, found_inf=skipped)
        optimizer.step()
    elif not skipped:
        optimizer.step()
