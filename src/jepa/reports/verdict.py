"""The verdict on a run in a word, as learning, behind raw pixels, stalled, unclear or collapsing, and in a sentence.

It follows from the rows of metrics.jsonl; accuracies are in percent. A gain is clear if its 95 % interval says so, for
the number of evaluated samples and of probes. The training loss does not count: in a healthy run
it falls and rises again, and in a collapsed run it is lowest. `predict/gain` can also stay high in a collapsed run, so
it counts only while the features stay spread out and only without labels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from statistics import NormalDist
from typing import Any

Rows = Sequence[Mapping[str, float]]
Series = list[tuple[int, float]]

CLASS_PROBES = {
    "classifier": "classifier",
    "linear": "linear probe",
    "knn": "kNN probe",
    "attentive": "attentive probe",
}
"""Probe of class labels -> its name in a sentence."""
MAP50 = "detect/map50"
DETECTED = {"detect/map": "mAP", "detect/map50": "mAP@.5", "detect/map75": "mAP@.75"}
REGRESSION = re.compile(r"probe/(\w+)_r2")
CLASSIFIER = "probe/classifier_"
CLASSIFIED = "probe/classifier_top1"
"""Metric of a trained head; its presence marks a supervised run."""
NUM_EVALUATED = "perf/evaluation_samples"
"""Metric: the number of held-out samples that were evaluated."""
MIN_EVALUATED = 20
"""Least number of evaluated samples for a verdict; of fewer, a single one moves an accuracy by more than 5 points."""
UNTRAINED, NOT_MEASURED = "untrained", "-"
RAW_PIXELS, CONSTANT = "behind raw pixels", "no better than a constant"
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
"""Least significant change of an accuracy in percentage points, however many samples there are."""
SIGNIFICANT_R2_POINTS = 5.0
"""Least significant change of R² in hundredths; values below zero count as zero: there the mean predicts better."""
WORTHWHILE = 2.5
"""A gain of so many least significant ones that the interval does not exclude leaves a verdict unclear."""
CONFIDENCE = 0.95
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
    """learning, behind raw pixels, no better than a constant, stalled, unclear, collapsing, too early or few to tell"""
    reason: str


def initial_weights(config: Mapping[str, Any]) -> str:
    """The initial weights of the encoder in one word for tables: "loaded" or "untrained"."""
    encoder = config.get("encoder") or {}
    return "loaded" if encoder.get("weights") and not encoder.get("fresh") else UNTRAINED


def verdict(rows: Rows, initial: str = UNTRAINED) -> Verdict:
    """The verdict on a run by its evaluations: collapse first, then the probes, without probes the prediction gain.

    `initial` describes the encoder of step 0, see `initial_weights`.

    A run is learning if the best probe of a kind (classification or regression) has a significant gain over step 0, the
    others have not lost as much, and the kind is ahead of raw pixels and of a constant prediction. A probe that gained
    three times that and kept it outweighs features that look collapsed.
    """
    kinds = [
        [change for name in names if (change := _change(rows, name))]
        for names in (class_probes(rows), [metric for metric, _ in regressions(rows)])
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
    learned = [kind for kind in kinds if kind and max(c.gain for c in kind) >= 1 and sum(c.gain for c in kind) >= 1]
    if learned:
        behind = [_behind(rows, kind) for kind in learned]
        return Verdict(behind[0] if all(behind) else "learning", f"{changes}; but {collapse}" if collapse else changes)
    spread = f"; {_spread(rows)}" if series(rows, "collapse/std") else ""
    if all(abs(change.gain) < 1 for change in probes) and best.may_be_worthwhile:
        return Verdict(
            "unclear",
            f"{changes}{spread}; with {best.samples:,} evaluated samples, a difference below {best.significant:.1f} "
            "points may be chance; train longer, or raise evaluation.val_samples",
        )
    return Verdict("stalled", f"{changes}{spread}: train longer, or change lr")


def _behind(rows: Rows, changes: Sequence[Change]) -> str:
    """What is at least as good as the best of these probes; empty if nothing is."""
    ahead = max(changes, key=lambda change: change.last)
    if REGRESSION.fullmatch(ahead.metric):  # each measures something else
        pixels = [(_baseline(rows, change.metric), change.last) for change in changes]
        return RAW_PIXELS if all(value is not None and value > last for value, last in pixels) else ""
    if ahead.constant(rows) is not None:
        return CONSTANT
    pixels = [value for change in changes if (value := _baseline(rows, change.metric)) is not None]
    return RAW_PIXELS if max(pixels, default=-math.inf) > ahead.last else ""


def _baseline(rows: Rows, metric: str) -> float | None:
    return last_value(rows, with_prefix(metric, "baseline/pixels_"))


def class_probes(rows: Rows) -> dict[str, str]:
    """Metric -> name of the class probes: the balanced accuracy where classes are uneven, as in the table."""
    names = {name for row in rows for name in row}
    metrics = {}
    for probe, title in CLASS_PROBES.items():
        is_balanced = f"probe/{probe}_balanced" in names
        metrics[f"probe/{probe}_{'balanced' if is_balanced else 'top1'}"] = title + " (balanced)" * is_balanced
    return {**metrics, MAP50: DETECTED[MAP50]}


def _too_few(rows: Rows) -> str | None:
    """A sentence if the evaluations saw too few samples; rows of earlier versions do not say how many they saw."""
    count = last_value(rows, NUM_EVALUATED)
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


def selection_metric(names: Collection[str], judge: str | None) -> str | None:
    """The first of these metrics that matches `judge`, or else SELECTION_METRICS; None if there is none."""
    patterns = [judge] if judge else SELECTION_METRICS
    return next((name for pattern in patterns for name in sorted(names) if fnmatch(name, pattern)), None)


def last_selection_value(rows: Rows, judge: str | None) -> float | None:
    """The last value of the selection metric after step 0."""
    name = selection_metric({name for row in rows if row["step"] > 0 for name in row}, judge)
    return None if name is None else last_value(rows, name, after=0)


def regressions(rows: Rows) -> list[tuple[str, str]]:
    """Metric and group of the regression probes, in the order in which they were measured."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [(name, match[1].replace("_", " ")) for name in names if (match := REGRESSION.fullmatch(name))]


def with_prefix(metric: str, prefix: str) -> str:
    """probe/linear_top1 -> baseline/pixels_linear_top1, still/linear_top1"""
    return prefix + metric.partition("/")[2]


def margin(metric: str, first: float, second: float, samples: int, num_probes: int = 1) -> float:
    """Half the interval, in points, of a difference of two values; of `num_probes` the best counts."""
    z = NormalDist().inv_cdf(1 - (1 - CONFIDENCE) / 2 / num_probes)
    shares = [min(1.0, max(0.0, value / 100)) for value in (first, second)]
    if REGRESSION.fullmatch(metric):  # variance of R² of many samples
        variances = [4 * share * (1 - share) ** 2 for share in shares]
    else:
        variances = [share * (1 - share) for share in shares]
    return 100 * z * (sum(variances) / samples) ** 0.5


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
    samples: int | None = None
    """evaluated samples; None in rows of earlier versions"""
    num_probes: int = 1
    """probes of which the best counts"""

    @property
    def least(self) -> float:
        return SIGNIFICANT_R2_POINTS if REGRESSION.fullmatch(self.metric) else SIGNIFICANT_POINTS

    def margin(self, other: float) -> float:
        """Half the interval, in points, of the difference between the last value and another one."""
        return 0.0 if self.samples is None else margin(self.metric, self.last, other, self.samples, self.num_probes)

    @property
    def significant(self) -> float:
        return max(self.least, self.margin(self.start))

    @property
    def may_be_worthwhile(self) -> bool:
        """True if the interval of the gain reaches one that would be worth having."""
        return self.samples is not None and self.gain * self.significant + self.significant > WORTHWHILE * self.least

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

    def constant(self, rows: Rows) -> float | None:
        """The accuracy of always naming the largest class, if the last value is not clearly above it."""
        value = last_value(rows, f"baseline/constant_{self.metric.rpartition('_')[2]}")
        return value if value is not None and self.last < value + self.margin(value) else None

    def sentence(self, rows: Rows, initial: str) -> str:
        match = REGRESSION.fullmatch(self.metric)
        title = f"R² of the {match[1].replace('_', ' ')} probe" if match else class_probes(rows)[self.metric]
        is_head = self.metric in DETECTED or self.metric.startswith(CLASSIFIER)
        reference = "start's" if is_head else f"{initial} encoder's"
        change = self.last - self.start
        difference = f"{abs(change):.1f} points {'above' if change >= 0 else 'below'} the {reference}"
        drop = f", down from {self.peak:.1f} % at step {self.peak_step}" if self.drop >= 2 * self.significant else ""
        comparisons = [
            f"{name}: {value:.1f} %{', still ahead' if value > self.last else ''}"
            for name, prefix in (("raw pixels", "baseline/pixels_"), ("middle frame only", "still/"))
            if (value := last_value(rows, with_prefix(self.metric, prefix))) is not None
        ]
        if (constant := self.constant(rows)) is not None:
            comparisons.append(f"always the largest class: {constant:.1f} %")
        baselines = f" ({'; '.join(comparisons)})" if comparisons else ""
        return f"the {title} is at {self.last:.1f} %{drop}, {difference} {self.start:.1f} %{baselines}"


def _change(rows: Rows, metric: str, opposite: bool = False) -> Change | None:
    """The change of a metric; `opposite` takes 1 - value. None with fewer than two evaluations."""
    values = [(step, 1 - value if opposite else value) for step, value in series(rows, metric)]
    if len(values) < 2:
        return None
    (first_step, start), (_, previous), (_, last) = values[0], *values[-2:]
    step, peak = max(values, key=lambda pair: pair[1])
    peak_name = "start" if step == first_step else f"value at step {step}"
    samples, measured = last_value(rows, NUM_EVALUATED), {name for row in rows for name in row}
    probes = measured & ({metric for metric, _ in regressions(rows)} or class_probes(rows).keys())
    return Change(
        metric, start, previous, last, peak, step, peak_name, int(samples) if samples else None, max(1, len(probes))
    )


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
    reason = f"the prediction {_against_constant(gain.last)} (step 0: {_against_constant(gain.start)}) and "
    reason += f"the centred rank went from {rank.start:.1f} to {rank.last:.1f}" if rank else "no rank was measured"
    reason += _rollouts(rows)
    hint = " (without labels this is a hint, not a proof)"
    if gain.last >= max(0.0, gain.start) + SIGNIFICANT_GAIN:
        return Verdict("learning", f"{reason}{hint}")
    return Verdict("stalled", f"{reason}: train longer, or raise lr{hint}")


def _against_constant(gain: float) -> str:
    """1 - error / error of a constant, in words; the share makes no sense where the constant is better."""
    return f"beats a constant by {gain:.0%}" if gain >= 0 else f"has {1 - gain:.2g} times the error of a constant"


def _rollouts(rows: Rows) -> str:
    """What the longest predictions of a world model are worth; empty for other runs."""
    names = {name for row in rows for name in row}
    horizons = [int(match[1]) for name in names if (match := re.fullmatch(r"predict/shuffled_error_h(\d+)", name))]
    error, copy, shuffled = (last_value(rows, f"predict/{name}_h{max(horizons, default=0)}") for name in WORLD_ERRORS)
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


def last_value(rows: Rows, name: str, after: int = -1) -> float | None:
    return next((value for step, value in reversed(series(rows, name)) if step > after), None)
