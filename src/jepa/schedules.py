"""Learning rate, weight decay and momentum as pure functions of the step, so that a resumed run needs no state."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jepa.types import NonNegative, PositiveShare


def linear(step: int, total: int, start: float, end: float) -> float:
    """`start` at step 0, `end` at step `total` and after."""
    progress = min(step / max(total, 1), 1.0)
    return start + (end - start) * progress


def cosine(step: int, total: int, start: float, end: float) -> float:
    """Half a cosine from `start` at step 0 to `end` at step `total` and after."""
    progress = min(step / max(total, 1), 1.0)
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Linear warm-up from `start_ratio * lr`, then the shape of the subclass; half a cosine for the weight decay.

    Steps count from 0. `warmup_epochs`, unless None, replaces `warmup_ratio`, a fraction of the run.
    """

    total_steps: int
    steps_per_epoch: int
    lr: float
    warmup_ratio: NonNegative
    warmup_epochs: NonNegative | None
    start_ratio: float
    final_ratio: float
    weight_decay: float
    final_weight_decay: float

    def __post_init__(self) -> None:
        if self.total_steps < 1:
            raise ValueError(f"the run has {self.total_steps} steps; raise epochs or steps")
        if not 0 <= self.warmup_steps < self.total_steps:
            raise ValueError(
                f"warm-up of {self.warmup_steps} steps in a run of {self.total_steps}: "
                "lower schedule.warmup_epochs or schedule.warmup_ratio, or raise epochs"
            )

    @property
    def warmup_steps(self) -> int:
        if self.warmup_epochs is None:
            return round(self.warmup_ratio * self.total_steps)
        return round(self.warmup_epochs * self.steps_per_epoch)

    def lr_at(self, step: int) -> float:
        warmup = self.warmup_steps
        if step < warmup:
            return linear(step, warmup, self.start_ratio * self.lr, self.lr)
        return self.after_warmup(step - warmup, self.total_steps - warmup)

    def weight_decay_at(self, step: int) -> float:
        return cosine(step, self.total_steps, self.weight_decay, self.final_weight_decay)

    def after_warmup(self, step: int, total: int) -> float:
        raise NotImplementedError("use Cosine, Constant or WarmupStableDecay")


@dataclass(frozen=True, kw_only=True)
class Cosine(Schedule):
    """Half a cosine from `lr` to `final_ratio * lr` (I-JEPA, arXiv:2301.08243, appendix A.1)."""

    def after_warmup(self, step: int, total: int) -> float:
        return cosine(step, total, self.lr, self.final_ratio * self.lr)


@dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """`lr` to the end; `final_ratio` must be 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.final_ratio != 1:
            raise ValueError(f"schedule.final_ratio={self.final_ratio}: a constant rate ends at 1 times lr")

    def after_warmup(self, step: int, total: int) -> float:
        return self.lr


@dataclass(frozen=True, kw_only=True)
class WarmupStableDecay(Schedule):
    """`lr`, then linear to `final_ratio * lr` over the last `decay_ratio` of the run (arXiv:2404.06395, section 4)."""

    decay_ratio: PositiveShare

    def after_warmup(self, step: int, total: int) -> float:
        decay = min(max(1, round(self.decay_ratio * self.total_steps)), total)
        return linear(max(step - (total - decay), 0), decay, self.lr, self.final_ratio * self.lr)
