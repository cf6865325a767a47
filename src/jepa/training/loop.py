"""The training loop; a step is one optimizer step over the batch of all ranks."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from jepa.data.box_transforms import BoxAugment
from jepa.data.transforms import Augment
from jepa.errors import RunError
from jepa.layers.dictionary import DictionaryStem
from jepa.optim import set_schedule
from jepa.parallel.device import peak_memory_gib
from jepa.parallel.session import Session, StopSignal
from jepa.parallel.signals import Interrupt
from jepa.schedules import Schedule
from jepa.seeding import derive_seed, generator
from jepa.training.progress import Progress
from jepa.training.step import SpikeGuard, StepOutput, train_step
from jepa.types import Field, Masker, Masks, RawBatch

if TYPE_CHECKING:
    from jepa.training.run import Run

FAILED_STATE = "The state is in checkpoints/failed"


class TrainingError(RunError):
    """The loss, its gradient or the features are not finite."""

    on_all_ranks = True


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The numbers of a run, in steps and samples; `begin_step` and `end_step` are those of the phase."""

    total_steps: int
    begin_step: int
    end_step: int
    batch_size: int
    """Samples in a step, over all ranks."""
    micro_batch_size: int
    """Samples of one rank in a forward pass."""
    dataset_size: int
    seed: int
    log_every: int
    eval_every: int
    save_every: int
    save_seconds: float = math.inf
    """Seconds between checkpoints, where these are sooner than `save_every` steps."""
    clip_grad: float | None

    def position(self, step: int) -> dict[str, float]:
        """Epochs and samples after `step` steps."""
        per_epoch = max(1, self.dataset_size // self.batch_size)  # the last, smaller batch is left out
        return {"epoch": step / per_epoch, "samples": step * self.batch_size}

    def is_due(self, every: int, done: int) -> bool:
        return done % every == 0 or done == self.end_step


@dataclass(frozen=True, kw_only=True)
class TrainComponents:
    """The objects that a training step uses."""

    session: Session
    objective: Any
    """An objectives.base.Objective."""
    wrapped: Any
    """The objective, or its compiled or distributed form; a step calls this one."""
    eval_copy: Any
    """FSDP only: unsharded copy of the objective on rank 0's CPU, used for evaluation."""
    optimizer: Optimizer
    schedule: Schedule
    guard: SpikeGuard | None
    masker: Masker
    image_masker: Masker | None = None
    """For batches of images when the run trains on clips."""
    augment: Augment | BoxAugment
    stems: Sequence[DictionaryStem] = ()
    """Dictionaries whose filters are trained after a share of the run."""
    fields: Mapping[str, Field]
    """Fields of each batch besides the labels."""


def fit(run: Run, batches: Iterator[RawBatch], interrupt: Interrupt, first_step: int) -> int:
    """Train from `first_step` to the end of the phase or to an interrupt; returns the number of finished steps."""
    plan, components, session = run.plan, run.components, run.components.session
    meter, stop_signal, clock = Meter(plan), StopSignal(session), SaveClock(plan.save_seconds)
    with Progress(first_step, plan.total_steps, plan.batch_size, is_shown=session.is_rank_zero) as progress:
        for step in range(first_step, plan.end_step):
            with meter.timer("data"):
                raw = next(batches)
            run.on_batch(raw)
            output, schedule = one_step(plan, components, raw, step)
            meter.outputs.append(output)
            done = step + 1
            if plan.is_due(plan.log_every, done):
                metrics = meter.read() | schedule | {"perf/peak_memory_gib": peak_memory_gib(session.device)}
                progress.show(done, run.log_steps(done, metrics))
            with meter.timer("excluded"):
                must_stop = end_of_step(run, done, interrupt, stop_signal, clock)
            if must_stop:
                return done
    return plan.end_step


def end_of_step(run: Run, done: int, interrupt: Interrupt, stop_signal: StopSignal, clock: SaveClock) -> bool:
    """Evaluate and save if due; returns True if all ranks stop now, after saving.

    Rank 0 decides when it is time to save: the number that all ranks exchange is odd then, and twice the signal.
    """
    plan = run.plan
    is_evaluated = plan.is_due(plan.eval_every, done)
    if is_evaluated:
        run.evaluate(done, interrupt)
    exchange = stop_signal.exchange if is_evaluated else stop_signal.exchange_async
    is_time = run.components.session.is_rank_zero and clock.strikes()
    signum, is_time = divmod(exchange(2 * interrupt.signum + is_time), 2)  # a later signal counts in the next step
    interrupt.signum_on_all_ranks = signum
    if plan.is_due(plan.save_every, done) or signum or is_time:
        with clock.saving():
            run.save(done)
    return signum != 0


class SaveClock:
    """Says when `seconds` have passed since the last checkpoint, or more where writing would take too large a share."""

    MAX_SHARE = 0.02
    """Of the time, that writing checkpoints by the clock may take."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.begun, self.writing = seconds, time.monotonic(), 0.0

    def strikes(self) -> bool:
        """True once, then again after the next interval."""
        now = time.monotonic()
        if now - self.begun < max(self.seconds, self.writing / self.MAX_SHARE):
            return False
        self.begun = now
        return True

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Measures how long writing takes; the next interval begins afterwards."""
        before = time.monotonic()
        yield
        self.begun = time.monotonic()
        self.writing = self.begun - before


def one_step(plan: Plan, components: TrainComponents, raw: RawBatch, step: int) -> tuple[StepOutput, dict[str, float]]:
    """A pure function of the weights, the raw batch of this rank and the step; also returns the schedules' values.

    Masks and crops are drawn for the batch of all ranks, so that they do not depend on the number of ranks.
    """
    session = components.session
    views, is_image = components.augment.views, raw.pixels.shape[2] == 1
    masker = components.image_masker if is_image and components.image_masker else components.masker
    rows = session.local_row_indices(plan.batch_size, views)
    masks = draw_masks(masker, plan.batch_size * views, generator(plan.seed, step, 0, "masks"), rows)
    masks = masks.map(lambda indices: indices.to(session.device, non_blocking=True))
    on_device = raw.map(lambda tensor: tensor.to(session.device, non_blocking=True))
    crops = generator(plan.seed, step, 0, "augment")
    batch = components.augment(on_device, crops, session.local_rows, session.world_size)
    for stem in components.stems:
        stem.at(step / plan.total_steps)
    lr, weight_decay = components.schedule.lr_at(step), components.schedule.weight_decay_at(step)
    set_schedule(components.optimizer, lr=lr, weight_decay=weight_decay)
    output = train_step(
        components.wrapped, components.optimizer, batch, masks, micro_batch_size=plan.micro_batch_size,
        autocast=session.autocast, clip_grad=plan.clip_grad, guard=components.guard,
        seed=derive_seed(plan.seed, step, session.rank, "step"), penalty=components.objective.regularization,
    )  # fmt: skip
    schedule = {"lr": lr, "weight_decay": weight_decay, **components.objective.after_step(step)}
    return output, {f"train/{name}": value for name, value in schedule.items()}


def draw_masks(masker: Masker, batch_size: int, generator: torch.Generator, rows: Tensor | None) -> Masks:
    """The given rows of the masks of a batch; a masker with an argument `rows` draws only those."""
    if rows is None:
        return masker(batch_size, generator)
    if "rows" in inspect.signature(masker).parameters:
        return masker(batch_size, generator, rows)  # pyright: ignore[reportCallIssue]
    return masker(batch_size, generator).map(lambda indices: indices[rows])


class Meter:
    """Collects the outputs of steps on the device; reading their means is the one host synchronisation."""

    MAX_SKIPPED = 20
    """Number of skipped steps in a row after which the run stops."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.skipped_in_a_row = 0
        self._restart()

    def _restart(self) -> None:
        self.outputs: list[StepOutput] = []
        self.seconds = {"data": 0.0, "excluded": 0.0}
        self.begun = time.perf_counter()

    @contextmanager
    def timer(self, kind: Literal["data", "excluded"]) -> Iterator[None]:
        """Measure the time inside: waiting for data, or not part of the training."""
        begun = time.perf_counter()
        yield
        self.seconds[kind] += time.perf_counter() - begun

    def read(self) -> dict[str, float]:
        """Means since the last reading; raises TrainingError if too many steps in a row were skipped."""
        names = ["loss", "grad_norm", "skipped", *self.outputs[0].metrics]
        columns = [torch.stack([o.loss, o.grad_norm, o.skipped, *o.metrics.values()]).float() for o in self.outputs]
        table = torch.stack(columns).cpu()
        elapsed = time.perf_counter() - self.begun - self.seconds["excluded"]
        accepted = table[:, 2] == 0
        self.skipped_in_a_row = 0 if accepted.any() else self.skipped_in_a_row + len(accepted)
        if self.skipped_in_a_row >= min(self.MAX_SKIPPED, self.plan.total_steps):
            raise TrainingError(
                f"the loss or its gradient was not finite in {self.skipped_in_a_row} steps in a row; these steps were "
                "skipped, so the weights are those before them. Try a lower lr, a smaller clip_grad or precision=fp32. "
                f"{FAILED_STATE}"
            )
        means = (table[accepted] if accepted.any() else table).mean(dim=0).tolist()
        values = {f"train/{name}": value for name, value in zip(names, means, strict=True)}
        values["train/skipped"] = float((~accepted).sum())
        values["perf/samples_per_s"] = len(columns) * self.plan.batch_size / elapsed
        values["perf/data_wait"] = self.seconds["data"] / elapsed
        self._restart()
        return values
