"""A run in its folder: resume, log, evaluate, save, report."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from tqdm.auto import tqdm

from jepa.data.loader import BrokenSamples
from jepa.data.mixture import MixtureCounter
from jepa.errors import Interrupted
from jepa.evaluation.types import Evaluation, Evaluator, EvaluatorTraits, Logger
from jepa.parallel.session import Session, StopSignal
from jepa.parallel.signals import Interrupt
from jepa.parallel.strategy import gather_full_state
from jepa.reports.console import evaluation_rows
from jepa.reports.run import write_report
from jepa.reports.text import printable
from jepa.reports.verdict import NUM_EVALUATED, collapse_alarm, initial_weights, selection_metric, series
from jepa.runs import checkpoint
from jepa.runs.folder import changed_length
from jepa.runs.metrics import PROTOCOL, read_config, read_rows, write_atomically
from jepa.training.loop import FAILED_STATE, Plan, TrainComponents, TrainingError, fit
from jepa.types import RawBatch

log = logging.getLogger(__name__)
EVALUATION_TIME = "perf/evaluation_s"
"""Metric of every evaluation that was not interrupted: its duration in seconds."""


@dataclass(kw_only=True)
class Run:
    folder: Path
    plan: Plan
    components: TrainComponents
    evaluators: Sequence[Evaluator]
    loggers: Sequence[Logger] = ()
    snapshotter: Any
    """A Snapshotter or a DetectionSnapshotter: takes the snapshots for the evaluators."""
    batches: Callable[[int], Generator[RawBatch, None, None]]
    """First step -> endless raw batches of this rank."""
    broken: BrokenSamples
    shares: MixtureCounter
    config_text: str
    facts: dict
    """Stored in every checkpoint: what it takes to load the encoder without the data set."""
    writer: checkpoint.Writer
    judge: str | None = None
    """Metric by which the `best` checkpoint is chosen; None for that of the verdict."""
    best: dict = field(default_factory=lambda: {"value": -math.inf, "step": 0})
    steps_begun: int = 0
    has_printed: bool = False
    """True once the table of evaluations has a head on the console."""

    @cached_property
    def config(self) -> dict[str, Any]:
        return yaml.safe_load(self.config_text)

    @property
    def initial(self) -> str:
        return initial_weights(self.config)

    @property
    def session(self) -> Session:
        return self.components.session

    def train(self, interrupt: Interrupt) -> int:
        """Resume, and train to the end of the phase or to an interrupt; returns the number of finished steps.

        On a TrainingError the state is saved in checkpoints/failed.
        """
        first_step = self.steps_begun = self.restore()
        self._write_protocol(first_step)
        try:
            done = self._train_from(first_step, interrupt)
        except TrainingError:
            self.save(self.steps_begun, links=("failed",))
            self.writer.finish()
            raise
        self.writer.finish()
        return done

    def _write_protocol(self, first_step: int) -> None:
        """How the probes measure, for the report; `verbose` prints it too."""
        parts = (self.snapshotter, *self.evaluators) if self.evaluators else ()
        protocol = [text for part in parts if (text := EvaluatorTraits.of(part).protocol)]
        if self.session.is_rank_zero:
            write_atomically(self.folder / PROTOCOL, "\n".join(protocol))
        for text in protocol if self.config.get("verbose") else ():
            log.info("%s", text)
        if self.evaluators and first_step == 0:
            log.info("evaluating the %s encoder first: step 0 of all curves", self.initial)

    def _train_from(self, first_step: int, interrupt: Interrupt) -> int:
        if self.lacks_evaluation(first_step):
            self.evaluate(first_step, interrupt)
        interrupt.signum_on_all_ranks = StopSignal(self.session).exchange(interrupt.signum)
        if interrupt.signum_on_all_ranks:
            return first_step
        with closing(self.batches(first_step)) as stream:
            return fit(self, stream, interrupt, first_step)

    def restore(self) -> int:
        """Load the last checkpoint, if any; returns the number of its finished steps."""
        path = self.session.broadcast_from_rank_zero(lambda: checkpoint.latest(self.folder))
        if path is None:
            return 0
        components = self.components
        checkpoint.restore(path, components.objective, components.optimizer, components.guard, self.session.group)
        state = checkpoint.peek(path)
        self.best = state.get("best") or self.best
        log.info("resuming from %s", path)
        if length := changed_length(read_config(path), self.config):
            self._tell_new_length(length, state["step"])
        return state["step"]

    def _tell_new_length(self, length: str, done: int) -> None:
        schedule, total = self.components.schedule, self.plan.total_steps
        before = [f"{rate:.2g}" for _, rate in series(read_rows(self.folder), "train/lr")[-1:]]
        rates = [*before, f"{schedule.lr_at(done):.2g} at step {done:,}", f"{schedule.lr_at(total - 1):.2g} at the end"]
        log.info(
            "%s: the schedules are from now on those of the new length: lr %s. The steps done had the old ones, so the "
            "numbers differ from those of a run that had this length from the start",
            length,
            " -> ".join(rates),
        )

    def on_batch(self, raw: RawBatch) -> None:
        self.steps_begun += 1
        self.broken.add(raw.broken)
        self.shares.add(raw.parts)

    def log_steps(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Log and return the means of the metrics over all ranks; unreadable samples of all ranks are counted too."""
        gathered = self.session.gather(({**metrics, **self.shares.read()}, sorted(self.broken.indices)))
        for _, indices in gathered:
            self.broken.add(torch.tensor(indices))
        means = {name: sum(values[name] for values, _ in gathered) / len(gathered) for name in gathered[0][0]}
        self.log(step, means)
        return means

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        data = {"data/broken": float(len(self.broken.indices))}
        for logger in self.loggers:
            logger.log(step, {**self.plan.position(step), **metrics, **data})

    def lacks_evaluation(self, step: int) -> bool:
        """True if an evaluation is due after `step` steps and was not made, or was interrupted by a signal."""
        if not self.evaluators or not self.plan.is_due(self.plan.eval_every, step):
            return False
        return self.session.broadcast_from_rank_zero(
            lambda: all(row["step"] != step for row in read_rows(self.folder) if EVALUATION_TIME in row)
        )

    def evaluate(self, step: int, interrupt: Interrupt) -> None:
        """Evaluate on rank 0; the others wait. An evaluation that a signal interrupts is repeated on resuming."""
        if not self.evaluators:
            return
        objective = self.components.objective
        if self.session.strategy == "fsdp":
            gather_full_state(objective, self.components.eval_copy)
            objective = self.components.eval_copy
        outcome = self.session.broadcast_from_rank_zero(lambda: self._evaluate(step, objective, interrupt))
        if outcome.error:
            raise TrainingError(outcome.error)
        if outcome.best:
            self.best = outcome.best
            self.save(step, links=("last", "best"))
        if self.session.is_rank_zero:
            self._print_row(step)
            write_report(self.folder)

    def _print_row(self, step: int) -> None:
        """The row of the evaluation of a step, if it was made; above the bar, if there is one."""
        rows, is_first = read_rows(self.folder), not self.has_printed
        if any(row["step"] == step and EVALUATION_TIME in row for row in rows):
            lines = evaluation_rows(rows, step, self.plan.total_steps, self.initial, with_head=is_first)
            tqdm.write(printable("\n".join(lines)), file=sys.stderr)
            self.has_printed = True

    def _evaluate(self, step: int, objective: Any, interrupt: Interrupt) -> EvaluationOutcome:
        begun = time.perf_counter()
        try:
            with interrupt.at_once():
                snapshot = self.snapshotter.snapshot(step, objective.to(self.session.device))
                evaluations = [one(snapshot) for one in self.due_evaluators(step) if snapshot.is_finite]
                pixels = self.snapshotter.baselines(snapshot, self.evaluators) if step == 0 and evaluations else {}
        except Interrupted:
            return EvaluationOutcome()
        finally:
            if objective is self.components.eval_copy:
                objective.cpu()
        if not snapshot.is_finite:
            return EvaluationOutcome(
                error=f"the features of step {step} are not finite: training has diverged; lower lr. {FAILED_STATE}"
            )
        metrics = {name: value for evaluation in evaluations for name, value in evaluation.metrics.items()} | pixels
        effort = {NUM_EVALUATED: float(snapshot.num_evaluated), EVALUATION_TIME: time.perf_counter() - begun}
        self.log(step, {**metrics, **effort})
        pictures = tuple(picture for evaluation in evaluations for picture in evaluation.pictures)
        tables = tuple(table for evaluation in evaluations for table in evaluation.tables)
        for logger in self.loggers:
            logger.show(step, Evaluation(pictures=pictures, tables=tables))
        return EvaluationOutcome(best=self._best(step, metrics))

    def due_evaluators(self, step: int) -> list[Evaluator]:
        """All evaluators; between the ends of the run without those that are only due there."""
        at_an_end = step in (0, self.plan.total_steps)
        return [one for one in self.evaluators if at_an_end or not EvaluatorTraits.of(one).only_at_ends]

    def _best(self, step: int, metrics: Mapping[str, float]) -> dict | None:
        """Metric, value and step if this is the best checkpoint so far; warns if the representation collapses."""
        if alarm := collapse_alarm(read_rows(self.folder)):
            log.warning(alarm)
        judge = selection_metric(metrics, self.judge)
        if judge is None and self.judge and step == 0:
            log.warning("evaluation.judge=%s is not measured; there are %s", self.judge, ", ".join(sorted(metrics)))
        is_new_metric = judge != self.best.get("metric", judge)
        if step > 0 and judge and (is_new_metric or metrics[judge] > self.best["value"]):
            return {"metric": judge, "value": metrics[judge], "step": step}
        return None

    def save(self, step: int, links: Sequence[str] = ("last",)) -> None:
        components, objective = self.components, self.components.objective
        backbone = next(name for name, module in objective.named_modules() if module is objective.backbone)
        self.writer.save(
            step=step, tensors=checkpoint.training_tensors(objective, components.optimizer, components.guard),
            config=self.config_text,
            state={"best": self.best, "backbone": backbone, "failed": links == ("failed",), **self.facts}, links=links,
        )  # fmt: skip


class EvaluationOutcome(NamedTuple):
    """Result of an evaluation, sent to all ranks."""

    best: dict | None = None
    error: str = ""
