"""Curves and point clouds as inline SVG: no scripts, colours from the page's style sheet, values as hover titles."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from markupsafe import Markup

WIDTH, HEIGHT = 360, 200
LEFT, RIGHT, TOP, BOTTOM = 54, 16, 8, 24
MAX_POINTS, MAX_HOVER_COLUMNS, MAX_DOTS = 160, 60, 40
NUM_COLOURS = 8
MAX_LEGEND = 12
Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Line:
    name: str
    points: Sequence[Point]
    """(step, value) in order of the steps; a value may be nan"""
    band: Sequence[Point] = ()
    """(lowest, highest) around each point"""


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """A baseline: one value for the whole run."""

    name: str
    value: float


@dataclass(frozen=True, kw_only=True)
class Chart:
    """The words around the curves."""

    title: str
    unit: str = ""
    hint: str = ""
    log_if_wide: bool = False
    """a logarithmic axis where the values span two decades"""
    axis: str = "step"
    """what the values stand over"""


@dataclass(frozen=True)
class Scale:
    """Values to pixels along one axis."""

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
            return log_ticks(self.low, self.high)
        return [t for t in nice_ticks(self.low, self.high, count) if self.low <= t <= self.high]


def line_chart(chart: Chart, lines: Sequence[Line], levels: Sequence[Baseline] = ()) -> Markup:
    """A figure with legend, axes, curves, baselines, hint; many points become their mean in a band of extremes."""
    thinned = [(line, downsample(line.points, band=line.band)) for line in lines]
    values = _drawn_values([b for _, buckets in thinned for b in buckets if math.isfinite(b.mean)])
    steps = [b.step for _, buckets in thinned for b in buckets]
    if not values:
        return _figure(chart, lines, levels, '<p class="empty">no finite value yet</p>')
    x = Scale(*_span(min(steps), max(steps)), LEFT, WIDTH - RIGHT)
    y = _value_scale(values, [level.value for level in levels], chart.log_if_wide)
    parts = [_axes(x, y, chart.axis), *(_baseline(level, index, y) for index, level in enumerate(levels))]
    parts += [_curve(buckets, index, x, y) for index, (_, buckets) in enumerate(thinned)]
    parts += [_hover_columns(chart, thinned, x)]
    label = f"{chart.title} over {max(steps):,.0f} {chart.axis}s"
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'
    return _figure(chart, lines, levels, svg)


@dataclass(frozen=True)
class Bucket:
    """Neighbouring points of a curve drawn as one."""

    step: float
    mean: float
    low: float
    high: float


def downsample(points: Sequence[Point], limit: int = MAX_POINTS, band: Sequence[Point] = ()) -> list[Bucket]:
    """At most `limit` buckets of equally many points, with the band around them where one is given.

    A mean is nan only where no point of the bucket is finite.
    """
    size = max(1, math.ceil(len(points) / limit))
    buckets = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        finite = [value for _, value in part if math.isfinite(value)] or [math.nan]
        reach = [*finite, *(edge for pair in band[start : start + size] for edge in pair)]
        buckets.append(Bucket(part[-1][0], sum(finite) / len(finite), min(reach), max(reach)))
    return buckets


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) that enclose [low, high]."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(k * step, 12 - math.floor(math.log10(step))) for k in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    stride = max(1, math.ceil(len(decades) / 5))
    return [10.0**k for k in decades if k % stride == 0 and low <= 10.0**k * 1.001 and 10.0**k <= high * 1.001]


def number(value: float) -> str:
    """Short for a person: 1.25M, 12.5k, 0.412, 3.2e-5, nan."""
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size >= 1e15 or 0 < size <= 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    for bound, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= bound:
            return f"{value / (1e3 if suffix == 'k' else bound):.3g}{suffix}"
    return f"{value:.4g}" if size >= 1000 else f"{value:.3g}"


def _span(low: float, high: float) -> tuple[float, float]:
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _drawn_values(buckets: list[Bucket]) -> list[float]:
    """Means and extremes; an extreme far from all means is cut, so that one spike does not flatten the curve."""
    means = [bucket.mean for bucket in buckets]
    reach = max(means, default=0.0) - min(means, default=0.0)
    spread = [max(b.low, min(means) - reach) for b in buckets] + [min(b.high, max(means) + reach) for b in buckets]
    return means + spread


def _value_scale(values: list[float], levels: list[float], log_if_wide: bool) -> Scale:
    everything = values + [v for v in levels if math.isfinite(v)]
    low, high = min(everything), max(everything)
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


def _axes(x: Scale, y: Scale, name: str) -> str:
    floor = HEIGHT - BOTTOM
    parts = []
    for tick in y.ticks(6):
        at = f"{y(tick):.1f}"
        parts.append(f'<path class="grid" d="M{LEFT} {at}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{at}" dy=".32em" text-anchor="end">{number(tick)}</text>')
    for tick in x.ticks(5):
        if tick == int(tick):
            at = f"{x(tick):.1f}"
            parts.append(f'<path class="axis" d="M{at} {floor}v4"/>')
            parts.append(f'<text class="tick" x="{at}" y="{floor + 17}" text-anchor="middle">{number(tick)}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {floor}H{WIDTH - RIGHT}"/>')
    parts.append(f'<text class="tick" x="0" y="{floor + 17}">{escape(name)}</text>')
    return "".join(parts)


def _baseline(level: Baseline, index: int, y: Scale) -> str:
    if not math.isfinite(level.value):
        return ""
    title = f"<title>{escape(level.name)}: {number(level.value)}</title>"
    return f'<path class="level d{index}" d="M{LEFT} {y(level.value):.1f}H{WIDTH - RIGHT}">{title}</path>'


def _curve(buckets: list[Bucket], index: int, x: Scale, y: Scale) -> str:
    """The line, broken where nothing is finite, over a band from the lowest to the highest value of each bucket."""
    floor = min(y.low, y.high)
    parts = []
    for run in _finite_segments(buckets):
        at = [(x(b.step), y(b.mean)) for b in run]
        if any(b.high > b.low for b in run):
            top = [f"{x(b.step):.1f} {max(y(min(b.high, y.high)), TOP):.1f}" for b in run]
            low = [f"{x(b.step):.1f} {y(max(b.low, floor)):.1f}" for b in reversed(run)]
            parts.append(f'<path class="band c{index}" d="M{"L".join(top + low)}Z"/>')
        parts.append(f'<path class="line c{index}" d="M{"L".join(f"{px:.1f} {py:.1f}" for px, py in at)}"/>')
        if len(run) == 1 or len(buckets) <= MAX_DOTS:
            parts += [f'<circle class="dot c{index}" cx="{px:.1f}" cy="{py:.1f}" r="2.5"/>' for px, py in at]
    return "".join(parts)


def _finite_segments(buckets: list[Bucket]) -> list[list[Bucket]]:
    runs: list[list[Bucket]] = [[]]
    for bucket in buckets:
        if math.isfinite(bucket.mean):
            runs[-1].append(bucket)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _hover_columns(chart: Chart, thinned: list[tuple[Line, list[Bucket]]], x: Scale) -> str:
    """Invisible columns that carry the values under the pointer as their titles."""
    by_step: dict[float, list[str]] = {}
    for line, buckets in thinned:
        for bucket in buckets:
            by_step.setdefault(bucket.step, []).append(f"{line.name}: {number(bucket.mean)}")
    steps = sorted(by_step)
    steps = steps[:: max(1, math.ceil(len(steps) / MAX_HOVER_COLUMNS))]
    at = [x(step) for step in steps]
    edges = [LEFT, *((a + b) / 2 for a, b in pairwise(at)), WIDTH - RIGHT]
    unit = f" {chart.unit}" if chart.unit else ""
    parts = []
    for step, (left, right) in zip(steps, pairwise(edges), strict=True):
        title = escape("\n".join([f"{chart.axis} {step:,.0f}", *(text + unit for text in by_step[step])]))
        size = f'x="{left:.1f}" y="{TOP}" width="{right - left:.1f}" height="{HEIGHT - TOP - BOTTOM}"'
        parts.append(f'<rect class="strip" {size}><title>{title}</title></rect>')
    return "".join(parts)


def _figure(chart: Chart, lines: Sequence[Line], levels: Sequence[Baseline], body: str) -> Markup:
    unit = f' <span class="unit">{escape(chart.unit)}</span>' if chart.unit else ""
    hint = f'<p class="hint">{escape(chart.hint)}</p>' if chart.hint else ""
    keys = [_key(f"c{index}", line.name, _last(line.points)) for index, line in enumerate(lines)]
    keys += [_key(f"d{index} dashed", level.name, number(level.value)) for index, level in enumerate(levels)]
    return Markup(
        f'<figure class="chart"><figcaption>{escape(chart.title)}{unit}</figcaption>'
        f'<div class="legend">{"".join(keys)}</div>{body}{hint}</figure>'
    )


def _key(style: str, name: str, value: str) -> str:
    swatch = f'<svg class="swatch" viewBox="0 0 20 8" aria-hidden="true"><path class="line {style}" d="M1 4H19"/></svg>'
    return f'<span class="key">{swatch}{escape(name)} <b>{escape(value)}</b></span>'


def _last(points: Sequence[Point]) -> str:
    """The last finite value; how many were not finite, where some were not."""
    finite = [value for _, value in points if math.isfinite(value)]
    missing = len(points) - len(finite)
    text = number(finite[-1]) if finite else "none"
    return f"{text} ({missing:,} not finite)" if missing else text


def scatter(points: Sequence[Point], labels: Sequence[str]) -> Markup:
    """Points in the plane, one colour and shape for each label; where there are many, the rarer ones are grey."""
    styles = mark_styles(labels)
    side, margin = WIDTH, 8
    x, y = (Scale(*_span(min(values), max(values)), margin, side - margin) for values in zip(*points, strict=True))
    marks = [
        f'<path class="mark {mark_class(styles[label])}" d="M{x(a):.1f} {side - y(b):.1f}{_shape(styles[label])}">'
        f"<title>{escape(label)}</title></path>"
        for (a, b), label in sorted(zip(points, labels, strict=True), key=lambda pair: styles[pair[1]] >= 0)
    ]
    svg = f'<svg viewBox="0 0 {side} {side}" role="img" aria-label="embeddings in the plane">{"".join(marks)}</svg>'
    return Markup(_mark_legend(styles) + svg)


def mark_styles(labels: Sequence[str]) -> dict[str, int]:
    """A number for each label, in their order; of more than MAX_LEGEND labels the rarer ones have -1."""
    frequent = [name for name, _ in Counter(sorted(labels)).most_common()]
    named = set(frequent if len(frequent) <= MAX_LEGEND else frequent[: MAX_LEGEND - 1])
    order = sorted(frequent, key=lambda name: (name not in named, len(name) if name.isdigit() else 0, name))
    return {name: number if name in named else -1 for number, name in enumerate(order)}


def mark_class(style: int) -> str:
    return "rest" if style < 0 else f"m{style % NUM_COLOURS}"


def _mark_legend(styles: Mapping[str, int]) -> str:
    """Nothing where there is only one label."""
    keys = [(name, style) for name, style in styles.items() if style >= 0]
    if len(keys) < len(styles):
        keys.append((f"{len(styles) - len(keys)} others", -1))
    swatches = [
        f'<span class="key"><svg class="swatch dot" viewBox="-5 -5 10 10" aria-hidden="true">'
        f'<path class="mark {mark_class(style)}" d="M0 0{_shape(style)}"/></svg>{escape(name)}</span>'
        for name, style in keys
    ]
    return f'<div class="legend">{"".join(swatches)}</div>' if len(keys) > 1 else ""


def _shape(style: int) -> str:
    """Relative path around the current point: disc, square, triangle or diamond, for eyes that mix up colours."""
    shapes = (
        "m-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0z",
        "m-2.7-2.7h5.4v5.4h-5.4z",
        "m0-3.6l3.4 6h-6.8z",
        "m0-3.8l3.8 3.8l-3.8 3.8l-3.8-3.8z",
    )
    return shapes[(style + style // NUM_COLOURS) % len(shapes)] if style >= 0 else shapes[0]
