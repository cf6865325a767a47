"""The training loop: it knows protocols only, and what it calls a step is one optimizer step over the whole batch."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from jepa.data.box_transforms import BoxAugment
from jepa.data.transforms import Augment
from jepa.errors import RunError
from jepa.optim import set_schedule
from jepa.parallel.device import peak_memory_gib
from jepa.parallel.session import Session, StopSignal
from jepa.parallel.signals import Interrupt
from jepa.schedules import Schedule
from jepa.seeding import derive_seed, generator
from jepa.training.progress import Progress
from jepa.training.step import SpikeGuard, StepOutput, train_step
from jepa.types import Field, Masker, Masks, RawBatch

KEPT = "The state is kept in checkpoints/failed"


class TrainingError(RunError):
    """The numbers of the run have gone wrong."""

    on_all_ranks = True


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The numbers of a run, in steps and samples."""

    total_steps: int
    begin_step: int
    end_step: int
    """of this phase of the run"""
    batch_size: int
    """of all ranks together"""
    micro_batch_size: int
    """samples of one rank in a forward pass"""
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
class TrainComponents:
    """What a training step needs."""

    session: Session
    objective: Any
    """an objectives.base.Objective"""
    wrapped: Any
    """the objective, or its compiled or distributed form: the one that a step calls"""
    eval_copy: Any
    """FSDP only: unsharded copy of the objective on rank 0's CPU, used for evaluation"""
    optimizer: Optimizer
    schedule: Schedule
    guard: SpikeGuard | None
    masker: Masker
    image_masker: Masker | None = None
    """for the batches of images in a run of clips"""
    augment: Augment | BoxAugment
    fields: Mapping[str, Field]
    """what each batch has besides the labels"""


class Trainee(Protocol):
    """What `fit` trains: a run, with what it does between steps. `step` counts the finished steps."""

    plan: Plan
    components: TrainComponents

    def on_batch(self, raw: RawBatch) -> None:
        """Sees every batch as the loader delivers it."""
        ...

    def log_steps(self, step: int, metrics: Mapping[str, float]) -> Mapping[str, float]:
        """Logs what this rank has measured and returns what all ranks have."""
        ...

    def evaluate(self, step: int, should_stop: Callable[[], bool]) -> None: ...

    def save(self, step: int) -> None: ...


def fit(run: Trainee, batches: Iterator[RawBatch], interrupt: Interrupt, first_step: int) -> int:
    """Train from `first_step` to the end of the phase or to an interrupt; returns the number of finished steps."""
    plan, components, session = run.plan, run.components, run.components.session
    meter, stop_signal = Meter(plan), StopSignal(session)
    with Progress(first_step, plan.total_steps, plan.batch_size, is_shown=session.is_rank_zero) as progress:
        for step in range(first_step, plan.end_step):
            with meter.data_timer():
                raw = next(batches)
            run.on_batch(raw)
            output, schedule = one_step(plan, components, raw, step)
            meter.add(output)
            done = step + 1
            if plan.is_due(plan.log_every, done):
                metrics = meter.read() | schedule | {"perf/peak_memory_gib": peak_memory_gib(session.device)}
                progress.show(done, run.log_steps(done, metrics))
            with meter.excluded():
                must_stop = end_of_step(run, done, interrupt, stop_signal)
            if must_stop:
                return done
    return plan.end_step


def end_of_step(run: Trainee, done: int, interrupt: Interrupt, stop_signal: StopSignal) -> bool:
    """Evaluates and saves where that is due; whether all ranks stop now, which they do only after saving."""
    plan = run.plan
    evaluates = plan.is_due(plan.eval_every, done)
    if evaluates:
        run.evaluate(done, interrupt.is_requested)
    exchange = stop_signal.exchange if evaluates else stop_signal.exchange_async
    signum = exchange(interrupt.signum)
    interrupt.signum_on_all_ranks = signum  # a signal after this line waits for the next step
    if plan.is_due(plan.save_every, done) or signum:
        run.save(done)
    return signum != 0


def one_step(plan: Plan, components: TrainComponents, raw: RawBatch, step: int) -> tuple[StepOutput, dict[str, float]]:
    """A pure function of the weights, the raw batch and the step; also returns the schedules' values.

    Masks and crops are drawn for the batch of all ranks, of which `raw` is this rank's part.
    """
    session = components.session
    views, is_image = components.augment.views, raw.pixels.shape[2] == 1
    masker = components.image_masker if is_image and components.image_masker else components.masker
    rows = session.local_row_indices(plan.batch_size, views)
    masks = draw_masks(masker, plan.batch_size * views, generator(plan.seed, step, 0, "masks"), rows)
    masks = masks.map(lambda indices: indices.to(session.device, non_blocking=True))
    on_device = raw.map(lambda tensor: tensor.to(session.device, non_blocking=True))
    batch = components.augment(on_device, generator(plan.seed, step, 0, "augment"), session.local_rows, session.world_size)
    lr, weight_decay = components.schedule.lr_at(step), components.schedule.weight_decay_at(step)
    set_schedule(components.optimizer, lr=lr, weight_decay=weight_decay)
    output = train_step(
        components.wrapped,
        components.optimizer,
        batch,
        masks,
        micro_batch_size=plan.micro_batch_size,
        autocast=session.autocast,
        clip_grad=plan.clip_grad,
        guard=components.guard,
        seed=derive_seed(plan.seed, step, session.rank, "step"),
        penalty=components.objective.regularization,
    )
    schedule = {"lr": lr, "weight_decay": weight_decay, **components.objective.after_step(step)}
    return output, {f"train/{name}": value for name, value in schedule.items()}


def draw_masks(masker: Masker, batch_size: int, generator: torch.Generator, rows: Tensor | None) -> Masks:
    """Of the masks of a batch the given rows; a masker that takes `rows` is spared the others."""
    if rows is None:
        return masker(batch_size, generator)
    if _takes_rows(masker):
        return masker(batch_size, generator, rows)  # pyright: ignore[reportCallIssue]
    return masker(batch_size, generator).map(lambda indices: indices[rows])


@cache
def _takes_rows(masker: Masker) -> bool:
    return "rows" in inspect.signature(masker).parameters


class Meter:
    """Sums on the device between two log lines; reading it is the one host synchronisation."""

    MAX_SKIPPED = 20
    """steps in a row that may be skipped before the run stops"""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.skipped_in_a_row = 0
        self._restart()

    def _restart(self) -> None:
        self.outputs: list[StepOutput] = []
        self.waited = 0.0
        self.begun = time.perf_counter()

    @contextmanager
    def data_timer(self) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.waited += time.perf_counter() - begun

    @contextmanager
    def excluded(self) -> Iterator[None]:
        """The time inside is not counted as training."""
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
        self.skipped_in_a_row = 0 if taken.any() else self.skipped_in_a_row + len(taken)
        if self.skipped_in_a_row >= min(self.MAX_SKIPPED, self.plan.total_steps):
            raise TrainingError(
                f"the loss or its gradient was not finite in {self.skipped_in_a_row} steps in a row; no such step was "
                "taken, so the weights are as before them. Try a lower lr, a smaller clip_grad or precision=fp32. "
                f"{KEPT}"
            )
