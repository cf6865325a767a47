"""What the numbers of a run say in words: learning, stalled, collapsing or too early to tell.

Works on the rows of metrics.jsonl alone; accuracies are in percent. The training loss is never asked: in a healthy run
it goes down, then up, and in a collapsed one it is best of all. `predict/gain`, too, can stay high in a collapsed run:
it counts only while the features stay spread out, and only where there are no labels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any, NamedTuple

Rows = Sequence[Mapping[str, float]]
Series = list[tuple[int, float]]

CLASS_PROBES = {
    "probe/classifier_top1": "classifier",
    "probe/linear_top1": "linear probe",
    "probe/knn_top1": "kNN probe",
    "probe/attentive_top1": "attentive probe",
    "detect/map50": "mAP@.5",
}
DETECTED = {"detect/map": "mAP", "detect/map50": "mAP@.5", "detect/map75": "mAP@.75"}
REGRESSION = re.compile(r"probe/(\w+)_r2")
CLASSIFIED = "probe/classifier_top1"
"""of the head that is trained: where it is measured, labels are what is learned"""
UNTRAINED = "untrained"
SELECTION_METRICS = (
    "probe/classifier_balanced",
    CLASSIFIED,
    "probe/linear_balanced",
    "probe/linear_top1",
    "probe/knn_top1",
    "probe/*_r2",
    "detect/map50",
    "predict/gain",
)
"""The first of these that is measured decides which checkpoint is `best`, unless `evaluation.judge` names another."""
SIGNIFICANT_POINTS = 2.0
"""percentage points; two standard errors of an accuracy of 50 % on 2,048 samples are 2.2"""
SIGNIFICANT_R2_POINTS = 5.0
"""hundredths of R^2, where it is above zero: below, the mean is the better answer"""
SIGNIFICANT_GAIN = 0.1
COLLAPSED_SPREAD = 0.1
"""share of the start (or the best value since) that std and 1 - cosine must both have fallen to; the dip of a healthy
run, before the predictor has something to say, was seen to go down to 0.2"""
COLLAPSED_RANK = 0.05
"""share of the start that the centred rank must have fallen to; in healthy runs 0.14 was seen"""
POINT_RANK = 1.5
"""a centred rank below this is a line or a point, whatever it was at the start"""
RECOVERY = 2.0
"""a value that has at least doubled since the evaluation before is leaving its dip"""


@dataclass(frozen=True)
class Verdict:
    word: str
    """learning, stalled, collapsing, or too early to tell"""
    reason: str


def initial_weights(config: Mapping[str, Any]) -> str:
    """What the encoder of a run with this configuration is before its first step, in one word for tables."""
    encoder = config.get("encoder") or {}
    return "loaded" if encoder.get("weights") and not encoder.get("fresh") else UNTRAINED


def verdict(rows: Rows, start: str = UNTRAINED) -> Verdict:
    """Judge a run by its evaluations: collapse first, then the probes, then (without any) the prediction.

    `start` names the encoder of step 0, see `initial_weights`.

    Learning is a clear gain over step 0 in the best probe of its kind (of classes, or regression), unless the others
    lost as much. Only a probe that has gained much more than that, and has kept it, outweighs features that look
    collapsed.
    """
    kinds = [[found for name in kind if (found := _probe_change(rows, name))] for kind in _probes(rows)]
    probes = [change for kind in kinds for change in kind]
    if not probes and not any(step > 0 for step, _ in series(rows, "collapse/std")):
        return Verdict("too early to tell", "there is no evaluation after step 0 yet")
    spoken = probes if len(probes) < 3 else [max(kinds[0], key=lambda c: c.gain)] * bool(kinds[0]) + kinds[1]
    collapsed, told = _collapse(rows), "; ".join(change.sentence(rows, start) for change in spoken)
    best = max(probes, key=lambda change: change.gain, default=None)
    if collapsed and not (best and best.gain >= 3 and best.drop < best.significant):
        return Verdict("collapsing", f"{collapsed}; {told}" if told else collapsed)
    if best is None:
        return _unlabelled(rows)
    if any(max(c.gain for c in kind) >= 1 and sum(c.gain for c in kind) >= 1 for kind in kinds if kind):
        return Verdict("learning", f"{told}; but {collapsed}" if collapsed else told)
    spread = f"; {_spread(rows)}" if series(rows, "collapse/std") else ""
    return Verdict("stalled", f"{told}{spread}: train longer, or change lr")


def collapse_alarm(rows: Rows) -> str | None:
    """A warning with what to try, or None while the features stay spread out."""
    found = _collapse(rows)
    if found is None:
        return None
    lr, momentum = _largest(rows, "train/lr"), _first(rows, "train/momentum")
    advice = [f"lr={lr / 3:.1g}" if lr else "a lower lr"]
    if momentum is not None and momentum < 1:
        advice.append(f"objective.momentum={1 - (1 - momentum) / 4:.4g} (the target encoder follows more slowly)")
    advice += ["regularizer=vicreg", "a smaller schedule.weight_decay", "a longer warm-up (schedule.warmup_ratio=0.2)"]
    return f"the representation is collapsing: {found}. Try, one at a time: {', '.join(advice)}"


class Column(NamedTuple):
    head: str
    metric: str
    unit: str = " %"


def selection_metric(names: Iterable[str], judge: str | None) -> str | None:
    """Which of the metrics decides; None where there is none such."""
    known = sorted(names)
    return next(
        (name for pattern in ([judge] if judge else SELECTION_METRICS) for name in known if fnmatch(name, pattern)),
        None,
    )


def last_selection_value(rows: Rows, judge: str | None) -> float | None:
    """The last value of the metric that decides, of an encoder that was trained."""
    name = selection_metric({name for row in rows if row["step"] > 0 for name in row}, judge)
    return None if name is None else _last(rows, name, after=0)


def table_columns(rows: Rows) -> list[Column]:
    """kNN and linear accuracy (balanced where classes are uneven), whatever other probe there is, and the rank.

    Of the untrained encoder, "fine-tuned" is trained on the labels alone. Of a detector its mean average precisions.
    """
    names = {name for row in rows for name in row}
    if names & DETECTED.keys():
        tested = {metric.replace("/", "/test_"): f"test {head}" for metric, head in DETECTED.items()}
        return [Column(head, name) for name, head in (DETECTED | tested).items() if name in names]
    regressions = [Column(f"{name} R²", metric) for metric, name in _regressions(rows)]
    columns = []
    for probe in ("classifier", "knn", "linear", "attentive", "finetune"):
        kind = "balanced" if f"probe/{probe}_balanced" in names else "top1"
        head = {"knn": "kNN", "finetune": "fine-tuned"}.get(probe, probe) + (" bal." if kind == "balanced" else "")
        measured = f"probe/{probe}_{kind}" in names
        if measured or (probe in ("knn", "linear") and not regressions and CLASSIFIED not in names):
            columns.append(Column(head, f"probe/{probe}_{kind}"))
    return [*columns, *regressions, Column("rank", "collapse/rank", "")]


def table_rows(rows: Rows, start: str = UNTRAINED) -> list[tuple[str, list[float | None]]]:
    """Title and a value for each of `table_columns`: encoder of step 0, raw pixels, one frame, trained encoder."""
    names = [column.metric for column in table_columns(rows)]
    step = max((s for name in names for s, _ in series(rows, name)), default=0)
    if names[0] in DETECTED or names[0].startswith("probe/classifier_"):
        what = "detector" if names[0] in DETECTED else "classifier"
        trained = (f"trained {what}, step {step}", [_last(rows, name, after=0) for name in names])
        return [(f"untrained {what}", [_at_zero(rows, name) for name in names]), trained]
    still = [_last(rows, _beside(name, "still/"), after=0) for name in names]
    return [
        (f"{start} encoder", [_at_zero(rows, name) for name in names]),
        ("raw pixels", [_last(rows, _beside(name, "baseline/pixels_")) for name in names]),
        *([("trained, middle frame only", still)] if any(value is not None for value in still) else []),
        (f"trained encoder, step {step}", [_last(rows, name, after=0) for name in names]),
    ]


def _probes(rows: Rows) -> tuple[list[str], list[str]]:
    """Names of the metrics: of classes, and regressions."""
    return list(CLASS_PROBES), [metric for metric, _ in _regressions(rows)]


def _regressions(rows: Rows) -> list[tuple[str, str]]:
    """Metric and group of the regression probes, in the order in which they were measured."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [(name, found[1].replace("_", " ")) for name in names if (found := REGRESSION.fullmatch(name))]


def _beside(metric: str, prefix: str) -> str:
    """probe/linear_top1 -> baseline/pixels_linear_top1, still/linear_top1"""
    return prefix + metric.partition("/")[2]


@dataclass(frozen=True)
class ProbeChange:
    metric: str
    start: float
    last: float
    peak: float
    peak_step: int

    @property
    def is_regression(self) -> bool:
        return REGRESSION.fullmatch(self.metric) is not None

    @property
    def change(self) -> float:
        return self.last - self.start

    @property
    def significant(self) -> float:
        return SIGNIFICANT_R2_POINTS if self.is_regression else SIGNIFICANT_POINTS

    @property
    def gain(self) -> float:
        """In units of what is clear."""
        start, last = (max(0.0, value) for value in (self.start, self.last))
        return (last - start) / self.significant

    @property
    def drop(self) -> float:
        return self.peak - self.last

    def sentence(self, rows: Rows, start: str) -> str:
        found = REGRESSION.fullmatch(self.metric)
        title = f"R² of the {found[1].replace('_', ' ')} probe" if found else CLASS_PROBES[self.metric]
        beginning = "start's" if self.metric in (*DETECTED, CLASSIFIED) else f"{start} encoder's"
        change = f"{abs(self.change):.1f} points {'above' if self.change >= 0 else 'below'} the {beginning}"
        fallen = f", down from {self.peak:.1f} % at step {self.peak_step}" if self.drop >= 2 * self.significant else ""
        others = (("raw pixels", "baseline/pixels_"), ("middle frame only", "still/"))
        told = [self._other(rows, name, prefix) for name, prefix in others]
        beside = f" ({'; '.join(filter(None, told))})" if any(told) else ""
        return f"the {title} is at {self.last:.1f} %{fallen}, {change} {self.start:.1f} %{beside}"

    def _other(self, rows: Rows, name: str, prefix: str) -> str:
        other = _last(rows, _beside(self.metric, prefix))
        if other is None:
            return ""
        return f"{name}: {other:.1f} %{', still ahead' if other > self.last else ''}"


def _probe_change(rows: Rows, metric: str) -> ProbeChange | None:
    values = series(rows, metric)
    if len(values) < 2:
        return None
    peak_step, peak = max(values, key=lambda pair: pair[1])
    return ProbeChange(metric, values[0][1], values[-1][1], peak, peak_step)


def _collapse(rows: Rows) -> str | None:
    """One sentence with the numbers, or None: no collapse is it where features gather by classes that are learned.

    Complete collapse: all images get the same vector, std and 1 - cosine fall together (std alone also falls when the
    features merely shrink). Dimensional collapse: the centred rank falls to a few directions.
    """
    if series(rows, CLASSIFIED):
        return None
    spread, angle = _drop_from_best(rows, "collapse/std"), _drop_from_best(rows, "collapse/cosine", opposite=True)
    if spread and angle and max(spread.share, angle.share) <= COLLAPSED_SPREAD and not spread.recovers:
        return (
            f"the std of the features fell to {spread.share:.0%} of its {spread.when} ({spread.reference:.3g} -> "
            f"{spread.last:.3g}) and all images point the same way (mean cosine {1 - angle.last:.3f})"
        )
    rank = _drop_from_best(rows, "collapse/rank_centred")
    if rank and (rank.share <= COLLAPSED_RANK or rank.last < POINT_RANK) and not rank.recovers:
        before = f"its {rank.when} was {rank.reference:.1f}"
        return f"the features vary in only {rank.last:.1f} directions (centred effective rank; {before})"
    return None


def _spread(rows: Rows) -> str:
    found = _drop_from_best(rows, "collapse/std")
    if found is None or found.share >= 0.5:
        return "the features have not collapsed"
    return f"the features have come closer (std at {found.share:.0%} of its {found.when}) but have not collapsed"


@dataclass(frozen=True)
class Drop:
    last: float
    reference: float
    when: str
    recovers: bool

    @property
    def share(self) -> float:
        return self.last / self.reference if self.reference > 0 else 1.0


def _drop_from_best(rows: Rows, name: str, opposite: bool = False) -> Drop | None:
    """The last value against the best so far; `opposite` takes 1 - value."""
    values = [(step, 1 - value if opposite else value) for step, value in series(rows, name)]
    if len(values) < 2:
        return None
    step, reference = max(values, key=lambda pair: pair[1])
    (_, before), (_, last) = values[-2:]
    when = "start" if step == values[0][0] else f"value at step {step}"
    return Drop(last, reference, when, recovers=last >= RECOVERY * before)


def _unlabelled(rows: Rows) -> Verdict:
    gain, rank = series(rows, "predict/gain"), series(rows, "collapse/rank_centred")
    hint = " (without labels this is a hint, not a proof)"
    if len(gain) < 2:
        return Verdict("too early to tell", "there is neither a probe nor a prediction error to compare with step 0")
    kept = (
        f"the centred rank went from {rank[0][1]:.1f} to {rank[-1][1]:.1f}" if len(rank) > 1 else "no rank was measured"
    )
    change = f"the prediction beats a constant by {gain[-1][1]:.0%} (step 0: {gain[0][1]:.0%}) and {kept}"
    if gain[-1][1] >= max(0.0, gain[0][1]) + SIGNIFICANT_GAIN:
        return Verdict("learning", f"{change}{hint}")
    return Verdict("stalled", f"{change}: train longer, or raise lr{hint}")


def series(rows: Rows, name: str) -> Series:
    """(step, value) in the order of steps; of a step written twice (after a resume) the later row counts."""
    values = {int(row["step"]): float(row[name]) for row in rows if name in row and math.isfinite(row[name])}
    return sorted(values.items())


def _first(rows: Rows, name: str) -> float | None:
    return next((value for _, value in series(rows, name)), None)


def _largest(rows: Rows, name: str) -> float | None:
    return max((value for _, value in series(rows, name)), default=None)


def _at_zero(rows: Rows, name: str) -> float | None:
    return dict(series(rows, name)).get(0)


def _last(rows: Rows, name: str, after: int = -1) -> float | None:
    return next((value for step, value in reversed(series(rows, name)) if step > after), None)
