"""What the numbers of a run say in words: learning, stalled, collapsing or too early to tell.

Works on the rows of metrics.jsonl alone; accuracies are in percent. The training loss is never asked: in a healthy run
it goes down, then up, and in a collapsed one it is best of all. `predict/gain`, too, can stay high in a collapsed run:
it counts only while the features stay spread out, and only where there are no labels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

Rows = Sequence[Mapping[str, float]]
Series = list[tuple[int, float]]


class Probe(NamedTuple):
    title: str
    baseline: str


PROBES = {
    "probe/linear_top1": Probe("linear probe", "baseline/pixels_linear_top1"),
    "probe/knn_top1": Probe("kNN probe", "baseline/pixels_knn_top1"),
}
CLEAR_POINTS = 2.0
"""percentage points; two standard errors of an accuracy of 50 % on 2,048 samples are 2.2"""
CLEAR_GAIN = 0.1
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


def verdict(rows: Rows) -> Verdict:
    """Judge a run by its evaluations: collapse first, then the probes, then (without labels) the prediction.

    Learning is a gain of CLEAR_POINTS over step 0 in the better probe, unless the other one lost as much. Only a probe
    that has gained much more than that, and has kept it, outweighs features that look collapsed.
    """
    if not any(step > 0 for name in ("collapse/std", *PROBES) for step, _ in series(rows, name)):
        return Verdict("too early to tell", "there is no evaluation after step 0 yet")
    probes = [found for name in PROBES if (found := _probe_change(rows, name)) is not None]
    collapsed, told = _collapse(rows), "; ".join(change.sentence(rows) for change in probes)
    best = max(probes, key=lambda change: change.points, default=None)
    if collapsed and not (best and best.points >= 3 * CLEAR_POINTS and best.lost < CLEAR_POINTS):
        return Verdict("collapsing", f"{collapsed}; {told}" if told else collapsed)
    if best is None:
        return _unlabelled(rows)
    if best.points >= CLEAR_POINTS and sum(change.points for change in probes) >= CLEAR_POINTS:
        return Verdict("learning", f"{told}; but {collapsed}" if collapsed else told)
    return Verdict("stalled", f"{told}; {_spread(rows)}: train longer, or change lr")


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


def table_rows(rows: Rows) -> list[tuple[str, list[float | None]]]:
    """Title, then kNN and linear in percent and rank: of the untrained encoder, raw pixels, the trained encoder."""
    names = ("probe/knn_top1", "probe/linear_top1", "collapse/rank")
    step = max((s for name in names for s, _ in series(rows, name)), default=0)
    return [
        ("untrained encoder", [_at_zero(rows, name) for name in names]),
        ("raw pixels", [_last(rows, f"baseline/pixels_{name.partition('/')[2]}") for name in names]),
        (f"trained encoder, step {step}", [_last(rows, name, after=0) for name in names]),
    ]


def final_table(rows: Rows) -> str:
    """Three lines with headings: untrained encoder, raw pixels, trained encoder; a dash where nothing was measured."""
    lines = [f"{'':<28}{'kNN':>8}{'linear':>8}{'rank':>8}"]
    return "\n".join(lines + [_table_line(title, values) for title, values in table_rows(rows)])


def _table_line(title: str, values: Sequence[float | None]) -> str:
    knn, linear, rank = values
    shares = "".join(f"{'-' if v is None else f'{v:.1f} %':>8}" for v in (knn, linear))
    return f"{title:<28}{shares}{'-' if rank is None else f'{rank:.1f}':>8}"


@dataclass(frozen=True)
class ProbeChange:
    metric: str
    start: float
    last: float
    peak: float
    peak_step: int

    @property
    def points(self) -> float:
        return self.last - self.start

    @property
    def lost(self) -> float:
        return self.peak - self.last

    def sentence(self, rows: Rows) -> str:
        change = f"{abs(self.points):.1f} points {'above' if self.points >= 0 else 'below'} the untrained encoder's"
        pixels = _last(rows, PROBES[self.metric].baseline)
        ahead = ", still ahead" if pixels is not None and pixels > self.last else ""
        beside = f" (raw pixels: {pixels:.1f} %{ahead})" if pixels is not None else ""
        fallen = f", down from {self.peak:.1f} % at step {self.peak_step}" if self.lost >= 2 * CLEAR_POINTS else ""
        return f"the {PROBES[self.metric].title} is at {self.last:.1f} %{fallen}, {change} {self.start:.1f} %{beside}"


def _probe_change(rows: Rows, metric: str) -> ProbeChange | None:
    values = series(rows, metric)
    if len(values) < 2:
        return None
    peak_step, peak = max(values, key=lambda pair: pair[1])
    return ProbeChange(metric, values[0][1], values[-1][1], peak, peak_step)


def _collapse(rows: Rows) -> str | None:
    """One sentence with the numbers, or None.

    Complete collapse: all images get the same vector, std and 1 - cosine fall together (std alone also falls when the
    features merely shrink). Dimensional collapse: the centred rank falls to a few directions.
    """
    spread, angle = _fallen(rows, "collapse/std"), _fallen(rows, "collapse/cosine", opposite=True)
    if spread and angle and max(spread.share, angle.share) <= COLLAPSED_SPREAD and not spread.recovers:
        return (
            f"the std of the features fell to {spread.share:.0%} of its {spread.when} ({spread.reference:.3g} -> "
            f"{spread.last:.3g}) and all images point the same way (mean cosine {1 - angle.last:.3f})"
        )
    rank = _fallen(rows, "collapse/rank_centred")
    if rank and (rank.share <= COLLAPSED_RANK or rank.last < POINT_RANK) and not rank.recovers:
        before = f"its {rank.when} was {rank.reference:.1f}"
        return f"the features vary in only {rank.last:.1f} directions (centred effective rank; {before})"
    return None


def _spread(rows: Rows) -> str:
    found = _fallen(rows, "collapse/std")
    if found is None or found.share >= 0.5:
        return "the features have not collapsed"
    return f"the features have come closer (std at {found.share:.0%} of its {found.when}) but have not collapsed"


@dataclass(frozen=True)
class Fall:
    last: float
    reference: float
    when: str
    recovers: bool

    @property
    def share(self) -> float:
        return self.last / self.reference if self.reference > 0 else 1.0


def _fallen(rows: Rows, name: str, opposite: bool = False) -> Fall | None:
    """The last value against the best so far; `opposite` takes 1 - value."""
    values = [(step, 1 - value if opposite else value) for step, value in series(rows, name)]
    if len(values) < 2:
        return None
    step, reference = max(values, key=lambda pair: pair[1])
    (_, before), (_, last) = values[-2:]
    when = "start" if step == values[0][0] else f"value at step {step}"
    return Fall(last, reference, when, recovers=last >= RECOVERY * before)


def _unlabelled(rows: Rows) -> Verdict:
    gain, rank = series(rows, "predict/gain"), series(rows, "collapse/rank_centred")
    hint = " (without labels this is a hint, not a proof)"
    if len(gain) < 2:
        return Verdict("too early to tell", "there is neither a probe nor a prediction error to compare with step 0")
    kept = (
        f"the centred rank went from {rank[0][1]:.1f} to {rank[-1][1]:.1f}" if len(rank) > 1 else "no rank was measured"
    )
    change = f"the prediction beats a constant by {gain[-1][1]:.0%} (step 0: {gain[0][1]:.0%}) and {kept}"
    if gain[-1][1] >= max(0.0, gain[0][1]) + CLEAR_GAIN:
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
