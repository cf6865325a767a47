"""The training loop: it knows protocols only, and what it calls a step is one optimizer step over the whole batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from jepa.data.transforms import Augment
from jepa.distributed import Session, derive_seed, generator, peak_memory_gib
from jepa.optim import set_schedule
from jepa.schedules import Schedule
from jepa.training.interrupt import Interrupt
from jepa.training.progress import Progress
from jepa.training.step import SpikeGuard, StepOutput, train_step
from jepa.types import Masker, RawBatch, RunError


class TrainingError(RunError):
    """The numbers of the run have gone wrong."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The numbers of a run, in steps and samples."""

    total_steps: int
    begin_step: int
    end_step: int
    """of this phase of the run"""
    batch_size: int
    micro_batch_size: int
    dataset_size: int
    seed: int
    log_every: int
    eval_every: int
    save_every: int
    clip_grad: float | None

    def position(self, step: int) -> dict[str, float]:
        """Where `step` finished steps stand, in epochs and samples."""
        samples = step * self.batch_size
        return {"epoch": samples / self.dataset_size, "samples": samples}

    def is_due(self, every: int, done: int) -> bool:
        return done % every == 0 or done == self.end_step


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a run is assembled from."""

    session: Session
    objective: Any
    """a module that is a types.Objective"""
    compiled: Any
    """the objective, or its compiled form: the one that is called"""
    optimizer: Optimizer
    schedule: Schedule
    guard: SpikeGuard | None
    masker: Masker
    image_masker: Masker | None = None
    """for the batches of images in a run of clips"""
    augment: Augment


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """What happens around the steps; each is told the number of finished steps."""

    log: Callable[[int, Mapping[str, float]], None]
    evaluate: Callable[[int], None]
    save: Callable[[int], None]
    note: Callable[[RawBatch], None]
    """sees every batch as the loader delivers it"""


def fit(
    plan: Plan, parts: Parts, batches: Iterator[RawBatch], hooks: Hooks, interrupt: Interrupt, first_step: int
) -> int:
    """Train from `first_step` to the end of the phase or to an interrupt; returns the number of finished steps."""
    meter = Meter(plan)
    with Progress(first_step, plan.total_steps, plan.batch_size) as progress:
        for step in range(first_step, plan.end_step):
            with meter.waiting():
                raw = next(batches)
            hooks.note(raw)
            output, schedule = one_step(plan, parts, raw, step)
            meter.add(output)
            done = step + 1
            if plan.is_due(plan.log_every, done):
                metrics = meter.read() | schedule | {"perf/peak_memory_gib": peak_memory_gib(parts.session.device)}
                hooks.log(done, metrics)
                progress.show(done, metrics)
            with meter.paused():
                stopping = pause(plan, hooks, done, interrupt)
            if stopping:
                return done
    return plan.end_step


def pause(plan: Plan, hooks: Hooks, done: int, interrupt: Interrupt) -> bool:
    """What is due after `done` steps; whether the run is to stop. Whoever stops saves first."""
    if plan.is_due(plan.eval_every, done):
        hooks.evaluate(done)
    stopping = interrupt.signum != 0  # read once: a signal after this line waits for the next step
    if plan.is_due(plan.save_every, done) or stopping:
        hooks.save(done)
    return stopping


def one_step(plan: Plan, parts: Parts, raw: RawBatch, step: int) -> tuple[StepOutput, dict[str, float]]:
    """A pure function of the weights, the raw batch and the step; also returns the schedules' values."""
    session = parts.session
    torch.manual_seed(derive_seed(plan.seed, step, session.rank, "step"))
    views, is_image = parts.augment.views, raw.pixels.shape[2] == 1
    masker = parts.image_masker if is_image and parts.image_masker else parts.masker
    masks = masker(plan.batch_size * views, generator(plan.seed, step, session.rank, "masks"))
    masks = masks.map(lambda indices: indices.to(session.device, non_blocking=True))
    on_device = RawBatch(*(t.to(session.device, non_blocking=True) for t in raw))
    batch = parts.augment(on_device, generator(plan.seed, step, session.rank, "augment"))
    lr, weight_decay = parts.schedule.lr_at(step), parts.schedule.weight_decay_at(step)
    set_schedule(parts.optimizer, lr=lr, weight_decay=weight_decay)
    output = train_step(
        parts.compiled,
        parts.optimizer,
        batch,
        masks,
        micro_batch_size=plan.micro_batch_size,
        autocast=session.autocast(),
        clip_grad=plan.clip_grad,
        guard=parts.guard,
    )
    schedule = {"lr": lr, "weight_decay": weight_decay, **parts.objective.after_step(step)}
    return output, {f"train/{name}": value for name, value in schedule.items()}


class Meter:
    """Sums on the device between two log lines; reading it is the one host synchronisation."""

    PATIENCE = 20

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.refused_in_a_row = 0
        self._restart()

    def _restart(self) -> None:
        self.outputs: list[StepOutput] = []
        self.waited = 0.0
        self.begun = time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.waited += time.perf_counter() - begun

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The time inside counts for nothing."""
        begun = time.perf_counter()
        yield
        self.begun += time.perf_counter() - begun

    def add(self, output: StepOutput) -> None:
        self.outputs.append(output)

    def read(self) -> dict[str, float]:
        """Means since the last reading; raises TrainingError when no step has been possible for a while."""
        names = ["loss", "grad_norm", "skipped", *self.outputs[0].metrics]
        columns = [torch.stack([o.loss, o.grad_norm, o.skipped, *o.metrics.values()]).float() for o in self.outputs]
        table = torch.stack(columns).cpu()
        elapsed = time.perf_counter() - self.begun
        taken = table[:, 2] == 0
        self._watch(taken)
        means = (table[taken] if taken.any() else table).mean(dim=0).tolist()
        values = {f"train/{name}": value for name, value in zip(names, means, strict=True)}
        values["train/skipped"] = float((~taken).sum())
        values["perf/samples_per_s"] = len(columns) * self.plan.batch_size / elapsed
        values["perf/data_wait"] = self.waited / elapsed
        self._restart()
        return values

    def _watch(self, taken: Tensor) -> None:
        self.refused_in_a_row = 0 if taken.any() else self.refused_in_a_row + len(taken)
        if self.refused_in_a_row >= min(self.PATIENCE, self.plan.total_steps):
            raise TrainingError(
                f"the loss or its gradient was not finite in {self.refused_in_a_row} steps in a row; no such step was "
                "taken, so the weights are as before them. Try a lower lr, a smaller clip_grad or precision=fp32"
            )
