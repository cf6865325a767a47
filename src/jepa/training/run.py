"""A run in its folder: resume, log, evaluate, save, report."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from jepa.data.loader import BrokenSamples
from jepa.data.mixture import MixtureCounter
from jepa.errors import Interrupted
from jepa.evaluation.types import Evaluation, Evaluator, EvaluatorTraits, Logger
from jepa.parallel.session import Session, StopSignal
from jepa.parallel.signals import Interrupt
from jepa.parallel.strategy import gather_full_state
from jepa.reports.run import write_report
from jepa.reports.verdict import collapse_alarm, initial_weights, selection_metric
from jepa.runs import checkpoint
from jepa.runs.metrics import read_rows
from jepa.training.loop import KEPT, Plan, TrainComponents, TrainingError, fit
from jepa.types import RawBatch

log = logging.getLogger(__name__)
EVALUATION_TIME = "perf/evaluation_s"
"""logged by every evaluation that was made to its end"""


@dataclass(kw_only=True)
class Run:
    folder: Path
    plan: Plan
    components: TrainComponents
    evaluators: Sequence[Evaluator]
    loggers: Sequence[Logger]
    snapshotter: Any
    """a Snapshotter or a DetectionSnapshotter: takes the snapshots that the evaluators look at"""
    batches: Callable[[int], Generator[RawBatch, None, None]]
    """endless raw batches of this rank from a step on"""
    broken: BrokenSamples
    shares: MixtureCounter
    config_text: str
    facts: dict
    """kept in every checkpoint: what is needed to load the encoder without the data set"""
    writer: checkpoint.Writer
    judge: str | None = None
    """the metric that decides which checkpoint is `best`; None leaves it to the verdict"""
    best: dict = field(default_factory=lambda: {"value": -math.inf, "step": 0})
    steps_begun: int = 0

    @property
    def session(self) -> Session:
        return self.components.session

    def train(self, interrupt: Interrupt) -> int:
        """To the end or to an interrupt, from where the folder stands; returns the number of finished steps.

        Where the numbers go wrong, the state is kept in checkpoints/failed.
        """
        first_step = self.steps_begun = self.restore()
        self._announce(first_step)
        try:
            done = self._train_from(first_step, interrupt)
        except TrainingError:
            self.save(self.steps_begun, links=("failed",))
            self.writer.finish()
            raise
        self.writer.finish()
        return done

    def _announce(self, first_step: int) -> None:
        """Says by which protocol the run is evaluated."""
        for part in (self.snapshotter, *self.evaluators) if self.evaluators else ():
            if protocol := EvaluatorTraits.of(part).protocol:
                log.info("%s", protocol)
        if first_step == 0 and self.evaluators:
            start = initial_weights(yaml.safe_load(self.config_text))
            log.info("evaluating the %s encoder first: step 0 of all curves", start)

    def _train_from(self, first_step: int, interrupt: Interrupt) -> int:
        if self.lacks_evaluation(first_step):
            self.evaluate(first_step, interrupt.is_requested)
        interrupt.signum_on_all_ranks = StopSignal(self.session).exchange(interrupt.signum)
        if interrupt.signum_on_all_ranks:
            return first_step
        with closing(self.batches(first_step)) as stream:
            return fit(self, stream, interrupt, first_step)

    def restore(self) -> int:
        """Load the last checkpoint, if any; the number of steps it had finished."""
        path, components = (
            self.session.broadcast_from_rank_zero(lambda: checkpoint.latest(self.folder)),
            self.components,
        )
        if path is None:
            return 0
        checkpoint.restore(path, components.objective, components.optimizer, components.guard, self.session.group)
        state = checkpoint.peek(path)
        self.best = state.get("best") or {}
        log.info("resuming from %s", path)
        return state["step"]

    def on_batch(self, raw: RawBatch) -> None:
        self.steps_begun += 1
        self.broken.note(raw.broken)
        self.shares.note(raw.parts)

    def log_steps(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """The means over all ranks of what each has measured and read of the last steps, in one exchange."""
        told = self.session.gather(({**metrics, **self.shares.read()}, sorted(self.broken.indices)))
        for _, indices in told:
            self.broken.note(torch.tensor(indices))
        means = {name: sum(own[name] for own, _ in told) / len(told) for name in told[0][0]}
        self.log(step, means)
        return means

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        data = {"data/broken": float(self.broken.count)}
        for logger in self.loggers:
            logger.log(step, {**self.plan.position(step), **metrics, **data})

    def lacks_evaluation(self, step: int) -> bool:
        """Whether the evaluation due after `step` steps is yet to be made: at the start, or one left at a signal."""
        is_due = bool(self.evaluators) and self.plan.is_due(self.plan.eval_every, step)
        return is_due and self.session.broadcast_from_rank_zero(lambda: self._is_unjudged(step))

    def _is_unjudged(self, step: int) -> bool:
        return step not in {int(row["step"]) for row in read_rows(self.folder) if EVALUATION_TIME in row}

    def evaluate(self, step: int, should_stop: Callable[[], bool] = lambda: False) -> None:
        """By rank 0, for which the others wait; left half done where the run is to stop: the next start makes it up."""
        if not self.evaluators:
            return
        objective = self.components.objective
        if self.session.strategy == "fsdp":
            gather_full_state(objective, self.components.eval_copy)
            objective = self.components.eval_copy
        outcome = self.session.broadcast_from_rank_zero(lambda: self._evaluate(step, objective, should_stop))
        if outcome.fault:
            raise TrainingError(outcome.fault)
        if outcome.best:
            self.best = outcome.best
            self.save(step, links=("last", "best"))
        if self.session.is_rank_zero:
            write_report(self.folder)

    def _evaluate(self, step: int, objective: Any, should_stop: Callable[[], bool]) -> Outcome:
        begun = time.perf_counter()
        try:
            snapshot = self.snapshotter.snapshot(step, objective.to(self.session.device), should_stop)
            if not snapshot.is_finite:
                return Outcome(
                    fault=f"the features of step {step} are not finite: the weights have blown up; lower lr. {KEPT}"
                )
            evaluations = [evaluator(snapshot) for evaluator in self._due(step)]
        except Interrupted:
            return Outcome()
        finally:
            if objective is self.components.eval_copy:
                objective.cpu()
        metrics = {name: value for evaluation in evaluations for name, value in evaluation.metrics.items()}
        if step == 0:
            metrics |= self.snapshotter.baselines(snapshot, self.evaluators)
        self.log(step, {**metrics, EVALUATION_TIME: time.perf_counter() - begun})
        shown = Evaluation(
            pictures=tuple(picture for evaluation in evaluations for picture in evaluation.pictures),
            tables=tuple(table for evaluation in evaluations for table in evaluation.tables),
        )
        for logger in self.loggers:
            logger.show(step, shown)
        return Outcome(best=self._judge(step, metrics))

    def _due(self, step: int) -> list[Evaluator]:
        """All but, between the first and the last step, those that are made at the two ends of a run only."""
        at_an_end = step in (0, self.plan.total_steps)
        return [one for one in self.evaluators if at_an_end or not EvaluatorTraits.of(one).only_at_ends]

    def _judge(self, step: int, metrics: Mapping[str, float]) -> dict | None:
        """What makes this the best checkpoint, if it is; warns when the representation collapses."""
        alarm = collapse_alarm(read_rows(self.folder))
        if alarm:
            log.warning(alarm)
        judge = selection_metric(metrics, self.judge)
        if judge is None and self.judge and step == 0:
            log.warning("evaluation.judge=%s is not measured; there are %s", self.judge, ", ".join(sorted(metrics)))
        is_other = judge != self.best.get("metric", judge)
        if step > 0 and judge and (is_other or metrics[judge] > self.best["value"]):
            return {"metric": judge, "value": metrics[judge], "step": step}
        return None

    def save(self, step: int, links: Sequence[str] = ("last",)) -> None:
        components = self.components
        self.writer.save(
            step=step,
            tensors=checkpoint.training_tensors(components.objective, components.optimizer, components.guard),
            config=self.config_text,
            state={"best": self.best, "backbone": self._backbone_name(), **self.facts},
            links=links,
        )

    def _backbone_name(self) -> str:
        objective = self.components.objective
        return next(name for name, part in objective.named_modules() if part is objective.backbone)


class Outcome(NamedTuple):
    """Of an evaluation, for all ranks."""

    best: dict | None = None
    fault: str = ""
