"""A run in its folder: resume, log, evaluate, save, report."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from jepa import checkpoint
from jepa.data.loader import BrokenSamples
from jepa.data.mixture import Shares
from jepa.evaluation.features import Prober
from jepa.folder_log import read_rows
from jepa.report import write_report
from jepa.training.interrupt import Interrupt
from jepa.training.loop import Hooks, Parts, Plan, TrainingError, fit
from jepa.types import Evaluation, Evaluator, Interrupted, Logger, RawBatch
from jepa.verdict import collapse_alarm, judging

log = logging.getLogger(__name__)

EVALUATION_TIME = "perf/evaluation_s"
"""logged by every evaluation that was made to its end"""


@dataclass(kw_only=True)
class Run:
    folder: Path
    plan: Plan
    parts: Parts
    evaluators: Sequence[Evaluator]
    loggers: Sequence[Logger]
    prober: Prober
    broken: BrokenSamples
    shares: Shares
    config_text: str
    facts: dict
    """kept in every checkpoint: what is needed to load the encoder without the data set"""
    keep: int
    judge: str | None = None
    """the metric that decides which checkpoint is `best`; None leaves it to the verdict"""
    best: dict = field(default_factory=lambda: {"value": -math.inf, "step": 0})

    def train(self, batches: Callable[[int], Generator[RawBatch, None, None]], interrupt: Interrupt) -> int:
        """To the end or to an interrupt, from where the folder stands; returns the number of finished steps."""
        first_step = self.restore()
        for judge in (self.prober, *self.evaluators):
            if protocol := getattr(judge, "protocol", None):
                log.info("%s", protocol)
        evaluate = partial(self.evaluate, should_stop=lambda: interrupt.signum != 0)
        if first_step == 0:
            log.info("judging the untrained encoder first: step 0 of all curves")
        if self.lacks_evaluation(first_step):
            evaluate(first_step)
        if interrupt.signum:
            return first_step
        hooks = Hooks(log=self.log, evaluate=evaluate, save=self.save, note=self.note)
        with closing(batches(first_step)) as stream:
            return fit(self.plan, self.parts, stream, hooks, interrupt, first_step)

    def restore(self) -> int:
        """Load the last checkpoint, if any; the number of steps it had finished."""
        found = checkpoint.latest(self.folder)
        if found is None:
            return 0
        state = checkpoint.read_state(found)
        self.parts.objective.load_state_dict(checkpoint.load_model(found))
        saved = checkpoint.load_optimizer(found)
        self.parts.optimizer.load_state_dict(saved["optimizer"])
        if self.parts.guard is not None:
            self.parts.guard.load_state_dict(saved["guard"])
        self.best = state["best"]
        log.info("resuming from %s", found)
        return state["step"]

    def note(self, raw: RawBatch) -> None:
        self.broken.note(raw.broken)
        self.shares.note(raw.parts)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        data = {"data/broken": float(self.broken.count)}
        if "train/loss" in metrics:
            data |= self.shares.read()
        for logger in self.loggers:
            logger.log(step, {**self.plan.position(step), **metrics, **data})

    def lacks_evaluation(self, step: int) -> bool:
        """Whether the evaluation due after `step` steps is yet to be made: at the start, or one left at a signal."""
        known = {int(row["step"]) for row in read_rows(self.folder) if EVALUATION_TIME in row}
        return self.plan.is_due(self.plan.eval_every, step) and step not in known

    def evaluate(self, step: int, should_stop: Callable[[], bool] = lambda: False) -> None:
        """Left half done where the run is to stop; the next start makes up for it."""
        begun = time.perf_counter()
        try:
            snapshot = self.prober.snapshot(step, self.parts.objective, should_stop)
            if not snapshot.val.vectors.isfinite().all():
                raise TrainingError(f"the features of step {step} are not finite: the weights have blown up; lower lr")
            evaluations = [evaluator(snapshot) for evaluator in self._due(step)]
        except Interrupted:
            return
        metrics = {name: value for evaluation in evaluations for name, value in evaluation.metrics.items()}
        if step == 0:
            metrics |= self.prober.baselines(snapshot, self.evaluators)
        self.log(step, {**metrics, EVALUATION_TIME: time.perf_counter() - begun})
        shown = Evaluation(
            pictures=tuple(picture for evaluation in evaluations for picture in evaluation.pictures),
            tables=tuple(table for evaluation in evaluations for table in evaluation.tables),
        )
        for logger in self.loggers:
            logger.show(step, shown)
        self._judge(step, metrics)
        write_report(self.folder)

    def _due(self, step: int) -> list[Evaluator]:
        """All but, between the first and the last step, those that are made at the two ends of a run only."""
        at_an_end = step in (0, self.plan.total_steps)
        return [one for one in self.evaluators if at_an_end or not getattr(one, "only_at_ends", False)]

    def _judge(self, step: int, metrics: Mapping[str, float]) -> None:
        """Keep the best checkpoint, and warn when the representation collapses."""
        alarm = collapse_alarm(read_rows(self.folder))
        if alarm:
            log.warning(alarm)
        judge = judging(metrics, self.judge)
        if judge is None and self.judge and step == 0:
            log.warning("evaluation.judge=%s is not measured; there are %s", self.judge, ", ".join(sorted(metrics)))
        is_other = judge != self.best.get("metric", judge)
        if step > 0 and judge and (is_other or metrics[judge] > self.best["value"]):
            self.best = {"metric": judge, "value": metrics[judge], "step": step}
            checkpoint.link(self.folder, "best", self._write(step))

    def save(self, step: int) -> None:
        self._write(step)
        checkpoint.prune(self.folder, keep=self.keep)

    def _write(self, step: int) -> Path:
        guard = {} if self.parts.guard is None else self.parts.guard.state_dict()
        return checkpoint.save(
            self.folder,
            step=step,
            model=self.parts.objective.state_dict(),
            optimizer={"optimizer": self.parts.optimizer.state_dict(), "guard": guard},
            config=self.config_text,
            state={"best": self.best, "backbone": self._backbone_name(), **self.facts},
        )

    def _backbone_name(self) -> str:
        objective = self.parts.objective
        return next(name for name, part in objective.named_modules() if part is objective.backbone)
