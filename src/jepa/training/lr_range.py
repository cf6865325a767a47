"""Learning-rate range test (Smith 2017, section 3.3), for losses that are also low where the features collapse."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from jepa.schedules import Schedule
from jepa.training.loop import Parts, Plan, one_step
from jepa.types import LossOutput, RawBatch


class Point(NamedTuple):
    lr: float
    loss: float
    spread: float
    """mean over the dimensions of the standard deviation of the embedding over the batch"""


@dataclass(frozen=True, kw_only=True)
class Ramp(Schedule):
    """From `low` to `lr` in equal ratios; weight decay stays as at the start."""

    low: float

    def lr_at(self, step: int) -> float:
        return self.low * (self.lr / self.low) ** (step / max(1, self.total_steps - 1))


def ramp(plan: Plan, parts: Parts, batches: Iterator[RawBatch], schedule: Ramp) -> Iterator[Point]:
    """Train while the learning rate grows, to the end or until the loss is not finite; the weights are spent."""
    parts, spreads = replace(parts, schedule=schedule, guard=None), []

    def note(module: object, arguments: object, output: LossOutput) -> None:
        spreads.append(output.embedding.float().std(0).mean())

    parts.objective.register_forward_hook(note)
    for step in range(schedule.total_steps):
        spreads.clear()
        output, _ = one_step(plan, parts, next(batches), step)
        loss, spread = torch.stack([output.loss.float(), torch.stack(spreads).mean()]).tolist()
        if not math.isfinite(loss):
            return
        yield Point(schedule.lr_at(step), loss, spread)


SMOOTHING = 0.85
KEPT_SPREAD = 0.5
"""share of the spread at the start below which the features are taken to collapse"""
RISE = 0.1
"""share of the loss's fall by which it must rise to have turned"""
SETTLED = 0.9
"""share of its fall after which the loss is where it will stay"""
SAFETY = {"collapse": 1.0, "settled": 1.0, "turn": 0.1, "end": 0.1}
"""which share of the learning rate where something happens is still good for a whole run; found by trial"""


class Found(NamedTuple):
    lr: float
    reason: str
    limits: dict[str, float]
    """learning rate at which each thing happens"""


REASONS = {
    "collapse": "the spread of the features falls below half at lr {:.2g}",
    "settled": "the loss has done nine tenths of its fall at lr {:.2g}",
    "turn": "the loss turns up at lr {:.2g}, and a tenth of that is safe",
    "end": "the last lr with a finite loss is {:.2g}, and a tenth of that is safe",
}


def choose(points: Sequence[Point]) -> Found | None:
    """The smallest of the limits, each with its share; None where too little was seen or nothing was learned."""
    if len(points) < 10:
        return None
    lrs = [point.lr for point in points]
    loss, spread = (smooth(values) for values in zip(*(point[1:] for point in points), strict=True))
    first = max(1, len(points) // 10)
    start, begun = sum(loss[:first]) / first, sum(spread[:first]) / first
    fall = start - min(loss)
    if fall <= max(loss[:first]) - min(loss[:first]):
        return None
    settled = next(i for i, value in enumerate(loss) if start - value >= SETTLED * fall)
    limits = {"settled": lrs[settled], "end": lrs[-1]}
    collapsed = next((i for i, value in enumerate(spread) if value < KEPT_SPREAD * begun), None)
    turned = next((i for i in range(len(loss)) if loss[i] - min(loss[: i + 1]) > RISE * fall), None)
    limits |= {name: lrs[i] for name, i in (("collapse", collapsed), ("turn", turned)) if i is not None}
    name = min(limits, key=lambda name: SAFETY[name] * limits[name])
    lr = float(f"{SAFETY[name] * limits[name]:.1e}")
    return Found(lr, REASONS[name].format(limits[name]), limits)


def smooth(values: Sequence[float]) -> list[float]:
    """Exponential mean without the bias of its start."""
    mean, weight, found = 0.0, 0.0, []
    for value in values:
        mean, weight = SMOOTHING * mean + (1 - SMOOTHING) * value, SMOOTHING * weight + 1 - SMOOTHING
        found.append(mean / weight)
    return found
