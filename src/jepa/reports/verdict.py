"""The verdict on a run: learning, stalled, collapsing, too early or too few samples to tell.

It follows from the rows of metrics.jsonl; accuracies are in percent. The training loss does not count: in a healthy run
it falls and rises again, and in a collapsed run it is lowest. `predict/gain` can also stay high in a collapsed run, so
it counts only while the features stay spread out and only without labels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
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
"""Metric of a trained head; its presence marks a supervised run."""
NUM_EVALUATED = "perf/evaluation_samples"
"""Metric: the number of held-out samples that were evaluated."""
MIN_EVALUATED = 20
"""Least number of evaluated samples for a verdict; of fewer, a single one moves an accuracy by more than 5 points."""
UNTRAINED, NOT_MEASURED = "untrained", "-"
WORLD_ERRORS = {"error": "error", "copy_error": "of copying", "shuffled_error": "with other actions"}
"""Errors of a world model's predictions."""
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
"""The first of these that was measured selects the checkpoint `best`, unless `evaluation.judge` names another."""
SIGNIFICANT_POINTS = 2.0
"""Significant change of an accuracy in percentage points; two standard errors of 50 % on 2,048 samples are 2.2."""
SIGNIFICANT_R2_POINTS = 5.0
"""Significant change of R² in hundredths; values below zero count as zero, since there the mean predicts better."""
SIGNIFICANT_GAIN = 0.1
"""Significant change of `predict/gain`, as a fraction."""
COLLAPSED_SPREAD = 0.1
"""Collapse threshold of std and of 1 - cosine, as a fraction of their highest value; early in healthy runs they fell to
0.2 of it."""
COLLAPSED_RANK = 0.05
"""Collapse threshold of the centred rank, as a fraction of its highest value; in healthy runs it fell to 0.14."""
POINT_RANK = 1.5
"""Centred rank below which the features lie on a line or a point, whatever it was at the start."""
RECOVERY = 2.0
"""Growth factor since the previous evaluation from which a value counts as recovering."""


@dataclass(frozen=True)
class Verdict:
    word: str
    """learning, stalled, collapsing, too early to tell, or too few to tell"""
    reason: str


def initial_weights(config: Mapping[str, Any]) -> str:
    """The initial weights of the encoder in one word for tables: "loaded" or "untrained"."""
    encoder = config.get("encoder") or {}
    return "loaded" if encoder.get("weights") and not encoder.get("fresh") else UNTRAINED


def verdict(rows: Rows, initial: str = UNTRAINED) -> Verdict:
    """The verdict on a run by its evaluations: collapse first, then the probes, without probes the prediction gain.

    `initial` describes the encoder of step 0, see `initial_weights`.

    A run is learning if the best probe of a kind (classification or regression) has a significant gain over step 0 and
    the others have not lost as much. A probe that gained three times that and kept it outweighs features that look
    collapsed.
    """
    kinds = [
        [change for name in names if (change := _change(rows, name))]
        for names in (CLASS_PROBES, [metric for metric, _ in _regressions(rows)])
    ]
    probes = [change for kind in kinds for change in kind]
    if not probes and not any(step > 0 for step, _ in series(rows, "collapse/std")):
        if any(step > 0 for step, _ in series(rows, NUM_EVALUATED)):
            return Verdict("too few to tell", "no evaluation had the labels or boxes that a measure of progress needs")
        return Verdict("too early to tell", "there is no evaluation after step 0 yet")
    reported = probes if len(probes) < 3 else [max(kinds[0], key=lambda c: c.gain)] * bool(kinds[0]) + kinds[1]
    if reason := _too_few(rows):
        return Verdict("too few to tell", reason)
    collapse, changes = _collapse(rows), "; ".join(change.sentence(rows, initial) for change in reported)
    best = max(probes, key=lambda change: change.gain, default=None)
    if collapse and not (best and best.gain >= 3 and best.drop < best.significant):
        return Verdict("collapsing", f"{collapse}; {changes}" if changes else collapse)
    if best is None:
        return _unlabelled(rows)
    if any(max(c.gain for c in kind) >= 1 and sum(c.gain for c in kind) >= 1 for kind in kinds if kind):
        return Verdict("learning", f"{changes}; but {collapse}" if collapse else changes)
    spread = f"; {_spread(rows)}" if series(rows, "collapse/std") else ""
    return Verdict("stalled", f"{changes}{spread}: train longer, or change lr")


def _too_few(rows: Rows) -> str | None:
    """A sentence if the evaluations saw too few samples; rows of earlier versions do not say how many they saw."""
    count = _last(rows, NUM_EVALUATED)
    if count is None or count >= MIN_EVALUATED:
        return None
    return f"only {count:.0f} held-out samples were evaluated: {MIN_EVALUATED} or more are needed, better hundreds"


def collapse_alarm(rows: Rows) -> str | None:
    """A warning with remedies, or None while the features stay spread out."""
    collapse = _collapse(rows)
    if collapse is None or _too_few(rows):
        return None
    rates, momenta = series(rows, "train/lr"), series(rows, "train/momentum")
    advice = [f"lr={max(lr for _, lr in rates) / 3:.1g}" if rates else "a lower lr"]
    if momenta and (momentum := momenta[0][1]) < 1:
        advice.append(f"objective.momentum={1 - (1 - momentum) / 4:.4g} (the target encoder follows more slowly)")
    advice += ["regularizer=vicreg", "a smaller schedule.weight_decay", "a longer warm-up (schedule.warmup_ratio=0.2)"]
    return f"the representation is collapsing: {collapse}. Try, one at a time: {', '.join(advice)}"


class Column(NamedTuple):
    head: str
    metric: str
    unit: str = " %"
    digits: int = 1

    def cell(self, value: float | None, deviation: float | None = None) -> str:
        if value is None:
            return NOT_MEASURED
        spread = "" if deviation is None else f" ± {deviation:.{self.digits}f}"
        return f"{value:.{self.digits}f}{spread}{self.unit}"


def selection_metric(names: Collection[str], judge: str | None) -> str | None:
    """The first of these metrics that matches `judge`, or else SELECTION_METRICS; None if there is none."""
    patterns = [judge] if judge else SELECTION_METRICS
    return next((name for pattern in patterns for name in sorted(names) if fnmatch(name, pattern)), None)


def last_selection_value(rows: Rows, judge: str | None) -> float | None:
    """The last value of the selection metric after step 0."""
    name = selection_metric({name for row in rows if row["step"] > 0 for name in row}, judge)
    return None if name is None else _last(rows, name, after=0)


def table_columns(rows: Rows) -> list[Column]:
    """Columns for kNN and linear accuracy (balanced if classes are uneven), the other probes and the rank.

    In the row of the untrained encoder, "fine-tuned" is training on labels alone. A detector has its mean average
    precisions instead.
    """
    names = {name for row in rows for name in row}
    if names & DETECTED.keys():
        tested = {metric.replace("/", "/test_"): f"test {head}" for metric, head in DETECTED.items()}
        return [Column(head, name) for name, head in (DETECTED | tested).items() if name in names]
    regressions = [Column(f"{name} R²", metric) for metric, name in _regressions(rows)]
    is_world = "predict/shuffled_error" in names
    columns = [Column(head, f"predict/{name}", "", 3) for name, head in WORLD_ERRORS.items()] if is_world else []
    for probe in ("classifier", "knn", "linear", "attentive", "finetune"):
        kind = "balanced" if f"probe/{probe}_balanced" in names else "top1"
        head = {"knn": "kNN", "finetune": "fine-tuned"}.get(probe, probe) + (" bal." if kind == "balanced" else "")
        always = probe in ("knn", "linear") and not regressions and not is_world and CLASSIFIED not in names
        if always or f"probe/{probe}_{kind}" in names:
            columns.append(Column(head, f"probe/{probe}_{kind}"))
    return [*columns, *regressions, Column("rank", "collapse/rank", "")]


def table_rows(rows: Rows, initial: str = UNTRAINED) -> list[tuple[str, list[float | None]]]:
    """Title and a value for each of `table_columns`: encoder of step 0, raw pixels, one frame, trained encoder."""
    names = [column.metric for column in table_columns(rows)]
    step = max((s for name in names for s, _ in series(rows, name)), default=0)
    start = [dict(series(rows, name)).get(0) for name in names]
    trained = [_last(rows, name, after=0) for name in names]
    if names[0] in DETECTED or names[0].startswith("probe/classifier_"):
        model = "detector" if names[0] in DETECTED else "classifier"
        return [(f"untrained {model}", start), (f"trained {model}, step {step}", trained)]
    still = [_last(rows, _with_prefix(name, "still/"), after=0) for name in names]
    return [
        (f"{initial} encoder", start),
        ("raw pixels", [_last(rows, _with_prefix(name, "baseline/pixels_")) for name in names]),
        *([("trained, middle frame only", still)] if any(value is not None for value in still) else []),
        (f"trained encoder, step {step}", trained),
    ]


def _regressions(rows: Rows) -> list[tuple[str, str]]:
    """Metric and group of the regression probes, in the order in which they were measured."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [(name, match[1].replace("_", " ")) for name in names if (match := REGRESSION.fullmatch(name))]


def _with_prefix(metric: str, prefix: str) -> str:
    """probe/linear_top1 -> baseline/pixels_linear_top1, still/linear_top1"""
    return prefix + metric.partition("/")[2]


@dataclass(frozen=True)
class Change:
    """The values of a metric over two evaluations or more."""

    metric: str
    start: float
    previous: float
    """second to last value"""
    last: float
    peak: float
    """highest value"""
    peak_step: int
    peak_name: str
    """evaluation of the highest value, for a sentence"""

    @property
    def significant(self) -> float:
        return SIGNIFICANT_R2_POINTS if REGRESSION.fullmatch(self.metric) else SIGNIFICANT_POINTS

    @property
    def gain(self) -> float:
        """The change since step 0 as a multiple of a significant one."""
        return (max(0.0, self.last) - max(0.0, self.start)) / self.significant

    @property
    def drop(self) -> float:
        return self.peak - self.last

    @property
    def share(self) -> float:
        """The last value as a fraction of the highest."""
        return self.last / self.peak if self.peak > 0 else 1.0

    @property
    def recovers(self) -> bool:
        return self.last >= RECOVERY * self.previous

    def sentence(self, rows: Rows, initial: str) -> str:
        match = REGRESSION.fullmatch(self.metric)
        title = f"R² of the {match[1].replace('_', ' ')} probe" if match else CLASS_PROBES[self.metric]
        reference = "start's" if self.metric in (*DETECTED, CLASSIFIED) else f"{initial} encoder's"
        change = self.last - self.start
        difference = f"{abs(change):.1f} points {'above' if change >= 0 else 'below'} the {reference}"
        drop = f", down from {self.peak:.1f} % at step {self.peak_step}" if self.drop >= 2 * self.significant else ""
        comparisons = [
            f"{name}: {value:.1f} %{', still ahead' if value > self.last else ''}"
            for name, prefix in (("raw pixels", "baseline/pixels_"), ("middle frame only", "still/"))
            if (value := _last(rows, _with_prefix(self.metric, prefix))) is not None
        ]
        baselines = f" ({'; '.join(comparisons)})" if comparisons else ""
        return f"the {title} is at {self.last:.1f} %{drop}, {difference} {self.start:.1f} %{baselines}"


def _change(rows: Rows, metric: str, opposite: bool = False) -> Change | None:
    """The change of a metric; `opposite` takes 1 - value. None with fewer than two evaluations."""
    values = [(step, 1 - value if opposite else value) for step, value in series(rows, metric)]
    if len(values) < 2:
        return None
    (first_step, start), (_, previous), (_, last) = values[0], *values[-2:]
    step, peak = max(values, key=lambda pair: pair[1])
    return Change(metric, start, previous, last, peak, step, "start" if step == first_step else f"value at step {step}")


def _collapse(rows: Rows) -> str | None:
    """A sentence with the numbers, or None. In supervised runs features gather by class, which is no collapse.

    Complete collapse: all images get the same vector, std and 1 - cosine fall together (std alone also falls when the
    features merely shrink). Dimensional collapse: the centred rank falls to a few directions.
    """
    if series(rows, CLASSIFIED):
        return None
    spread, angle = _change(rows, "collapse/std"), _change(rows, "collapse/cosine", opposite=True)
    if spread and angle and max(spread.share, angle.share) <= COLLAPSED_SPREAD and not spread.recovers:
        return (
            f"the std of the features fell to {spread.share:.0%} of its {spread.peak_name} ({spread.peak:.3g} -> "
            f"{spread.last:.3g}) and all images point the same way (mean cosine {1 - angle.last:.3f})"
        )
    rank = _change(rows, "collapse/rank_centred")
    if rank and (rank.share <= COLLAPSED_RANK or rank.last < POINT_RANK) and not rank.recovers:
        before = f"its {rank.peak_name} was {rank.peak:.1f}"
        return f"the features vary in only {rank.last:.1f} directions (centred effective rank; {before})"
    return None


def _spread(rows: Rows) -> str:
    std = _change(rows, "collapse/std")
    if std is None or std.share >= 0.5:
        return "the features have not collapsed"
    return f"the features have come closer (std at {std.share:.0%} of its {std.peak_name}) but have not collapsed"


def _unlabelled(rows: Rows) -> Verdict:
    gain, rank = _change(rows, "predict/gain"), _change(rows, "collapse/rank_centred")
    if gain is None:
        return Verdict("too early to tell", "there is neither a probe nor a prediction error to compare with step 0")
    reason = f"the prediction beats a constant by {gain.last:.0%} (step 0: {gain.start:.0%}) and "
    reason += f"the centred rank went from {rank.start:.1f} to {rank.last:.1f}" if rank else "no rank was measured"
    reason += _rollouts(rows)
    hint = " (without labels this is a hint, not a proof)"
    if gain.last >= max(0.0, gain.start) + SIGNIFICANT_GAIN:
        return Verdict("learning", f"{reason}{hint}")
    return Verdict("stalled", f"{reason}: train longer, or raise lr{hint}")


def _rollouts(rows: Rows) -> str:
    """What the longest predictions of a world model are worth; empty for other runs."""
    names = {name for row in rows for name in row}
    horizons = [int(match[1]) for name in names if (match := re.fullmatch(r"predict/shuffled_error_h(\d+)", name))]
    error, copy, shuffled = (_last(rows, f"predict/{name}_h{max(horizons, default=0)}") for name in WORLD_ERRORS)
    if not (error and copy and shuffled):
        return ""
    return (
        f"; after {max(horizons)} steps the error is {error / copy:.2f} of that of copying the last frame, and "
        f"{shuffled / error:.2f} times as large with the actions of other samples"
    )


def series(rows: Rows, name: str) -> Series:
    """Finite (step, value) in order of the steps; of a step written twice (after a resume) the later row counts."""
    values = {int(row["step"]): float(row[name]) for row in rows if name in row and math.isfinite(row[name])}
    return sorted(values.items())


def _last(rows: Rows, name: str, after: int = -1) -> float | None:
    return next((value for step, value in reversed(series(rows, name)) if step > after), None)
