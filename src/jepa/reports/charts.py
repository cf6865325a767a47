"""Line charts and scatter plots as inline SVG: no scripts, colours from page.css, values as hover titles."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import NamedTuple

from markupsafe import Markup

from jepa.reports.page import render

WIDTH, HEIGHT = 360, 200
"""Size of a chart in pixels."""
LEFT, RIGHT, TOP, BOTTOM = 54, 16, 8, 24
"""Margins around the axes in pixels."""
MAX_POINTS, MAX_HOVER_COLUMNS, MAX_DOTS = 160, 60, 40
SCATTER_MARGIN = 8
"""Margin around the points of a scatter plot in pixels."""
NUM_COLOURS = 8
OUTSIDE = " (not in this range)"
"""What the legend says of a baseline that is too far away to be drawn."""
MIN_PERCENT = 10.0
"""Least range of an axis in percent, so that chance does not look like a change."""
MAX_LEGEND = 12
"""Number of labels in the legend of a scatter plot."""
Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Line:
    name: str
    points: Sequence[Point]
    """(step, value) in order of the steps; values may be nan"""
    band: Sequence[Point] = ()
    """(lowest, highest) value at each point"""


@dataclass(frozen=True, kw_only=True)
class ReferenceLine:
    """A value that others are compared with, as a line through the whole chart."""

    name: str
    value: float


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Title, unit, hint and axes of a chart."""

    title: str
    unit: str = ""
    hint: str = ""
    log_if_wide: bool = False
    """logarithmic axis if the values span two decades"""
    axis: str = "step"
    """quantity on the horizontal axis"""
    has_powers: bool = False
    """whether horizontal positions are powers of ten"""
    mark: ReferenceLine | None = None
    """a vertical line at this position"""

    def position(self, x: float) -> str:
        """A horizontal position as text."""
        return number(10**x if self.has_powers else x)


@dataclass(frozen=True)
class Scale:
    """Map from values to pixels along one axis."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log10(v) if self.is_log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, count: int) -> list[float]:
        if self.is_log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            return [10.0**k for k in decades if k % max(1, math.ceil(len(decades) / 5)) == 0]
        return [t for t in nice_ticks(self.low, self.high, count) if self.low <= t <= self.high]


def linear_scale(values: Sequence[float], start: float, end: float) -> Scale:
    """A scale over the range of the values, or around them if they are equal."""
    low, high = min(values), max(values)
    return Scale(low, high, start, end) if high > low else Scale(low - 0.5, high + 0.5, start, end)


def line_chart(chart: Chart, lines: Sequence[Line], baselines: Sequence[ReferenceLine] = ()) -> Markup:
    """A figure with legend, axes, curves, baselines and hint; long curves are downsampled to means with a band."""
    curves = [downsample(line.points, band=line.band) for line in lines]
    buckets = [bucket for curve in curves for bucket in curve]
    finite = [bucket for bucket in buckets if math.isfinite(bucket.mean)]
    keys = [(f"c{index}", line.name, _last_value(line.points)) for index, line in enumerate(lines)]
    least = MIN_PERCENT if chart.unit == "%" else 0.0
    levels = [
        (i, base) for i, base in enumerate(baselines) if math.isfinite(base.value) and _is_near(base, finite, least)
    ]
    drawn = {index for index, _ in levels}
    keys += [
        (f"d{index} dashed", base.name, number(base.value) + (OUTSIDE if finite and index not in drawn else ""))
        for index, base in enumerate(baselines)
    ]
    if not finite:
        return render("chart.html", chart=chart, keys=keys, is_empty=True)
    steps = [bucket.step for bucket in buckets]
    x = linear_scale(steps, LEFT, WIDTH - RIGHT)
    y = _value_scale([*_clipped_values(finite), *(base.value for _, base in levels)], chart.log_if_wide, least)
    return render(
        "chart.html", chart=chart, keys=keys, is_empty=False, width=WIDTH, height=HEIGHT, x=x, y=y, levels=levels,
        segments=[segment for index, curve in enumerate(curves) for segment in _segments(curve, index, x, y)],
        columns=_hover_columns(chart, lines, curves, x), last_step=max(steps), number=number,
        ticks=list(zip(y.ticks(6), tick_labels(y.ticks(6)), strict=True)),
    )  # fmt: skip


@dataclass(frozen=True)
class Bucket:
    """Neighbouring points of a curve, drawn as one point and a band."""

    step: float
    mean: float
    low: float
    high: float


def downsample(points: Sequence[Point], limit: int = MAX_POINTS, band: Sequence[Point] = ()) -> list[Bucket]:
    """At most `limit` buckets of equally many points; a mean is nan only if no point of the bucket is finite."""
    size = max(1, math.ceil(len(points) / limit))
    buckets = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        finite = [value for _, value in part if math.isfinite(value)] or [math.nan]
        values = [*finite, *(edge for edges in band[start : start + size] for edge in edges)]
        buckets.append(Bucket(part[-1][0], sum(finite) / len(finite), min(values), max(values)))
    return buckets


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) that enclose [low, high]."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(k * step, 12 - math.floor(math.log10(step))) for k in range(first, last + 1)]


def number(value: float, digits: int = 3) -> str:
    """The number in a few characters: 1.25M, 12.5k, 0.412, 3.2e-5, nan."""
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size >= 1e15 or 0 < size <= 1e-3:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    for bound, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= bound:
            return f"{value / (1e3 if suffix == 'k' else bound):.{digits}g}{suffix}"
    return f"{value:.{digits + (size >= 1000)}g}"


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """A text for each tick, with as many digits as tell them apart."""
    texts = ([number(tick, digits) for tick in ticks] for digits in range(3, 9))
    return next((labels for labels in texts if len(set(labels)) == len(labels)), [f"{tick:g}" for tick in ticks])


def _is_near(baseline: ReferenceLine, buckets: Sequence[Bucket], least: float) -> bool:
    """Whether the curves keep a third of the height or more beside the baseline; level curves have no height."""
    means = [bucket.mean for bucket in buckets] or [baseline.value]
    low, high = min(means), max(means)
    reach = 2 * max(high - low, least) or math.inf
    return math.isfinite(baseline.value) and low - reach <= baseline.value <= high + reach


def _clipped_values(buckets: list[Bucket]) -> list[float]:
    """Means and extremes; extremes far from all means are clipped, so that one spike does not flatten the curve."""
    means = [bucket.mean for bucket in buckets]
    reach = max(means) - min(means)
    low, high = min(means) - reach, max(means) + reach
    return [*means, *(max(b.low, low) for b in buckets), *(min(b.high, high) for b in buckets)]


def _value_scale(values: list[float], log_if_wide: bool, least: float) -> Scale:
    low, high = min(values), max(values)
    if (missing := least - (high - low)) > 0:
        low, high = low - missing / 2, high + missing / 2
        low = 0.0 if low < 0 <= min(values) else low
    start, end = HEIGHT - BOTTOM, TOP
    if log_if_wide and low > 0 and high / low >= 100:
        return Scale(10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high)), start, end, is_log=True)
    if 0 < low < 0.5 * high:
        low = 0.0
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-30):
        margin = abs(high) * 0.1 or 1.0
        low, high = low - margin, high + margin
    margin = 0.06 * (high - low)
    return Scale(low - margin if low else 0.0, high + margin, start, end)


class Segment(NamedTuple):
    """A part of a curve without gaps, in pixels as text."""

    colour: int
    points: list[tuple[str, str]]
    band: list[str]
    """Corners of the band from the lowest to the highest value of each bucket."""
    has_dots: bool


def _segments(buckets: list[Bucket], colour: int, x: Scale, y: Scale) -> Iterator[Segment]:
    for is_finite, group in groupby(buckets, key=lambda bucket: math.isfinite(bucket.mean)):
        segment, band = list(group), []
        if is_finite and any(b.high > b.low for b in segment):
            band = [f"{x(b.step):.1f} {max(y(min(b.high, y.high)), TOP):.1f}" for b in segment]
            band += [f"{x(b.step):.1f} {y(max(b.low, y.low)):.1f}" for b in reversed(segment)]
        if is_finite:
            points = [(f"{x(b.step):.1f}", f"{y(b.mean):.1f}") for b in segment]
            yield Segment(colour, points, band, has_dots=len(segment) == 1 or len(buckets) <= MAX_DOTS)


def _hover_columns(
    chart: Chart, lines: Sequence[Line], curves: list[list[Bucket]], x: Scale
) -> list[tuple[str, float, float]]:
    """Values at the steps, left edge and width of the invisible columns that show them under the pointer."""
    unit = f" {chart.unit}" if chart.unit else ""
    texts: dict[float, list[str]] = {}
    for line, curve in zip(lines, curves, strict=True):
        for bucket in curve:
            texts.setdefault(bucket.step, []).append(f"{line.name}: {number(bucket.mean)}{unit}")
    steps = sorted(texts)[:: max(1, math.ceil(len(texts) / MAX_HOVER_COLUMNS))]
    edges = [x.start, *((x(a) + x(b)) / 2 for a, b in pairwise(steps)), x.end]
    titles = ["\n".join([f"{chart.axis} {chart.position(step)}", *texts[step]]) for step in steps]
    return [(title, left, right - left) for title, (left, right) in zip(titles, pairwise(edges), strict=True)]


def _last_value(points: Sequence[Point]) -> str:
    """The last finite value, and the number of values that are not finite."""
    finite = [value for _, value in points if math.isfinite(value)]
    missing = len(points) - len(finite)
    text = number(finite[-1]) if finite else "none"
    return f"{text} ({missing:,} not finite)" if missing else text


def scatter(points: Sequence[Point], labels: Sequence[str]) -> Markup:
    """A scatter plot with a colour and shape for each label; of many labels the rarer ones are grey."""
    styles = mark_styles(labels)
    x, y = (linear_scale(values, SCATTER_MARGIN, WIDTH - SCATTER_MARGIN) for values in zip(*points, strict=True))
    marks = [(x(a), WIDTH - y(b), label) for (a, b), label in zip(points, labels, strict=True)]
    keys = [(name, style) for name, style in styles.items() if style >= 0]
    if len(keys) < len(styles):
        keys.append((f"{len(styles) - len(keys)} others", -1))
    return render(
        "scatter.html", side=WIDTH, marks=sorted(marks, key=lambda mark: styles[mark[2]] >= 0), styles=styles,
        keys=keys, mark_class=mark_class, shape=_shape,
    )  # fmt: skip


def mark_styles(labels: Sequence[str]) -> dict[str, int]:
    """A number for each label in sorted order; of more than MAX_LEGEND labels the rarer ones have -1."""
    frequent = [name for name, _ in Counter(sorted(labels)).most_common()]
    named = set(frequent if len(frequent) <= MAX_LEGEND else frequent[: MAX_LEGEND - 1])
    order = sorted(frequent, key=lambda name: (name not in named, len(name) if name.isdigit() else 0, name))
    return {name: number if name in named else -1 for number, name in enumerate(order)}


def mark_class(style: int) -> str:
    return "rest" if style < 0 else f"m{style % NUM_COLOURS}"


def _shape(style: int) -> str:
    """SVG path of a disc, square, triangle or diamond around the current point, readable without colours."""
    shapes = (
        "m-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0z",
        "m-2.7-2.7h5.4v5.4h-5.4z",
        "m0-3.6l3.4 6h-6.8z",
        "m0-3.8l3.8 3.8l-3.8 3.8l-3.8-3.8z",
    )
    return shapes[(style + style // NUM_COLOURS) % len(shapes)] if style >= 0 else shapes[0]
