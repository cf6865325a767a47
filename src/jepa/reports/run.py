"""report.html: what happened in a run, from its folder alone, in one file that needs no service, script or network."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from markupsafe import Markup

from jepa.reports.charts import Baseline, Chart, Line, Point, line_chart, number, scatter
from jepa.reports.page import Table, data_url, image, principal_plane, render
from jepa.reports.sections import DETECTION, MOTION, SECTIONS, TRAINING, Curve, class_curves
from jepa.reports.verdict import (
    CLASSIFIED,
    DETECTED,
    REGRESSION,
    UNTRAINED,
    Column,
    initial_weights,
    table_columns,
    table_rows,
    verdict,
)
from jepa.runs.metrics import (
    CAPTIONS,
    MEDIA,
    PROVENANCE,
    Row,
    read_config,
    read_json,
    read_rows,
    step_of,
    write_atomically,
)

TONES = {
    "finished": "good", "running": "calm", "stopped": "wait", "failed": "bad",
    "learning": "good", "stalled": "wait", "collapsing": "bad",
}  # fmt: skip
SIGNS = {"good": "\u2713", "bad": "\u26a0", "wait": "\u23f8", "calm": "\u22ef"}
NOT_MEASURED = "-"
MAX_CLOUD = 600
"""vectors drawn of an embedding"""
CLOUD_CAPTION = (
    "Features of images on their two main directions, each evaluation on its own; under the pointer, their labels."
)
HORIZON = re.compile(r"predict/(error|copy_error|trivial_error)_h(\d+)")
HORIZON_LINES = {"error": "predictor", "copy_error": "copy of the last step", "trivial_error": "mean target"}
MOTION_METRICS = re.compile(rf"still/.*|{REGRESSION.pattern}|predict/copy_error")
Section = tuple[str, str, list[Markup]]
"""title, lead, charts"""
Panel = tuple[str, list[tuple[str, Markup]], str]
"""title, drawings with the moment of each, caption"""


def write_report(folder: Path) -> Path:
    """Write FOLDER/report.html from what lies in the folder; readers see the old report or the new one."""
    folder = Path(folder)
    rows = read_rows(folder)
    facts = read_json(folder / PROVENANCE)
    ended = read_json(folder / "run.json")
    config: dict = {}
    with suppress(yaml.YAMLError):  # edited by hand: it is shown as it is
        config = read_config(folder)
    start = initial_weights(config)
    status, message = _status(facts, ended)
    result, judged = final_table(rows, start), verdict(rows, start)
    measured = [row for row in result.rows if set(row[1:]) != {NOT_MEASURED}]
    sections, others = _curves(rows, start)
    page = render(
        "run.html", name=str(facts.get("name", folder.name)), status=status, tone=TONES.get(status, "calm"),
        verdict=judged, verdict_tone=TONES.get(judged.word, "calm"), sign=SIGNS[TONES.get(judged.word, "calm")],
        message=message if not message or message.startswith(status) else f"{status}: {message}",
        facts=_facts(rows, facts), result=replace(result, rows=measured), sections=sections, others=others,
        result_style="trained" if measured and measured[-1][0].startswith("trained") else "",
        panels=_panels(folder, start), **_origin(folder, facts),
    )  # fmt: skip
    target = folder / "report.html"
    write_atomically(target, page)
    return target


def _status(facts: Mapping, ended: Mapping) -> tuple[str, str]:
    """How the run stands: run.json is the authority, the logger knows where a process had no time to write it."""
    status, message = ended.get("status", "running"), str(ended.get("message", ""))
    return (facts.get("status", status) if status == "running" else status), message


def _facts(rows: Sequence[Row], facts: Mapping) -> dict[str, str]:
    last: Row = {name: value for row in rows for name, value in row.items()}
    shown = {}
    if rows:
        shown["steps"] = f"{last['step']:,}"
        shown |= {"epochs": number(last["epoch"])} if "epoch" in last else {}
        shown |= {"samples": f"{last['samples']:,.0f}"} if "samples" in last else {}
    if math.isfinite(last.get("perf/samples_per_s", math.nan)):
        shown["samples/s"] = number(last["perf/samples_per_s"])
    if facts.get("sessions"):
        shown["started"] = _time(facts["sessions"][0]["started"])
    return shown | {"written": _time(time.time())}


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def final_table(rows: Sequence[Row], start: str = UNTRAINED) -> Table:
    """The encoder of step 0, raw pixels and the trained encoder."""
    columns = table_columns(rows)
    lines = [[title, *map(_cell, values, columns)] for title, values in table_rows(rows, start)]
    return Table(heads=["", *(column.head for column in columns)], rows=lines)


def _cell(value: float | None, column: Column) -> str:
    return NOT_MEASURED if value is None else f"{value:.1f}{column.unit}"


def _curves(rows: Sequence[Row], start: str) -> tuple[list[Section], list[Markup]]:
    """The sections, and charts of all other metrics, so that nothing logged is hidden."""
    columns: dict[str, list[Point]] = {}
    for row in rows:
        for name, value in row.items():
            columns.setdefault(name, []).append((row["step"], value))
    metrics = {name for name in columns if "/" in name and not name.startswith("baseline/")}
    sections = []
    for title, (lead, curves) in SECTIONS.items():
        if title == MOTION:
            if not any(MOTION_METRICS.fullmatch(name) for name in metrics):
                continue
            curves = [*_regressions(columns), *curves]
        if title == DETECTION:
            curves = [*curves, *class_curves(columns)]
        if title == TRAINING and columns.keys() & {CLASSIFIED, *DETECTED}:
            lead = ""  # of a loss with labels none of it is true
        drawn = [_chart(curve, columns, start) for curve in curves if metrics & set(curve.metrics)]
        metrics -= {name for curve in curves for name in curve.metrics}
        if title == MOTION:
            drawn += _horizons(columns)
            metrics = {name for name in metrics if not HORIZON.fullmatch(name)}
        if drawn:
            sections.append((title, lead, drawn))
    return sections, [_chart(Curve(title=name, metrics={name: name}), columns, start) for name in sorted(metrics)]


def _regressions(columns: Mapping[str, list[Point]]) -> list[Curve]:
    """One chart for each group of measured quantities."""
    groups = [found[1] for name in columns if (found := REGRESSION.fullmatch(name))]
    return [
        Curve(
            title=f"{group.replace('_', ' ').capitalize()} probe, R²", starts=True, unit="%",
            metrics={f"probe/{group}_r2": "trained", f"still/{group}_r2": "middle frame only"},
            baselines={f"baseline/pixels_{group}_r2": "raw pixels"},
            hint="Variance explained by ridge regression on the features; below 0, the mean is the better answer.",
        )
        for group in groups
    ]  # fmt: skip


def _horizons(columns: Mapping[str, list[Point]]) -> list[Markup]:
    """A chart of the last evaluation's errors over the number of steps ahead; none where there is only one step."""
    last: dict[str, list[Point]] = {}
    for name, points in columns.items():
        if found := HORIZON.fullmatch(name):
            last.setdefault(found[1], []).append((int(found[2]), points[-1][1]))
    if max((len(points) for points in last.values()), default=0) < 2:
        return []
    lines = [Line(name=HORIZON_LINES[kind], points=sorted(last[kind])) for kind in HORIZON_LINES if kind in last]
    chart = Chart(
        title="Prediction error over the horizon", axis="horizon",
        hint="Of the last evaluation, in time steps of the encoder after the last one seen.",
    )  # fmt: skip
    return [line_chart(chart, lines)]


def _chart(curve: Curve, columns: Mapping[str, list[Point]], start: str) -> Markup:
    lines = [
        Line(name=label, points=[(step, value * curve.factor) for step, value in columns[name]])
        for name, label in curve.metrics.items()
        if name in columns
    ]
    levels = []
    if curve.starts and lines[0].points[0][0] == 0:
        levels.append(Baseline(name=start, value=lines[0].points[0][1]))
    for name, label in curve.baselines.items():
        levels += [Baseline(name=label, value=value) for _, value in columns.get(name, [])[-1:]]
    return line_chart(curve, lines, levels)


def _panels(folder: Path, start: str) -> list[Panel]:
    """Pictures and embeddings of the latest evaluation, beside those of step 0 where they differ."""
    last = max(folder.glob(f"{MEDIA}/step_*"), default=None)
    if last is None:
        return []
    captions = read_json(last / CAPTIONS)
    order = {name: place for place, name in enumerate(captions)}
    paths = sorted(last.glob("*.png"), key=lambda path: order.get(path.stem, len(order)))
    panels = [_panel(path, _picture, captions.get(path.stem, ""), start) for path in paths]
    return panels + [_panel(path, _cloud, CLOUD_CAPTION, start) for path in sorted(last.glob("*.npz"))]


def _panel(path: Path, draw: Callable[[Path], Markup], caption: str, start: str) -> Panel:
    before = path.parent.with_name("step_00000000") / path.name
    paths = [path]
    if before != path and before.exists() and before.read_bytes() != path.read_bytes():
        paths.insert(0, before)
    figures = [(_moment(path, start), draw(path)) for path in paths]
    return path.stem.replace("_", " ").capitalize(), figures, caption


def _moment(path: Path, start: str) -> str:
    step = step_of(path.parent)
    return f"step {step:,}" + (f" ({start})" if step == 0 else "")


def _picture(path: Path) -> Markup:
    return image(data_url(path.read_bytes()), path.stem)


def _cloud(path: Path) -> Markup:
    with np.load(path) as arrays:
        vectors, labels = arrays["vectors"], arrays["labels"].tolist()
    if len(vectors) < 3 or not np.isfinite(vectors).all():
        return Markup('<p class="empty">nothing to draw: fewer than three vectors, or not finite</p>')
    stride = math.ceil(len(vectors) / MAX_CLOUD)
    points, shares = principal_plane(vectors[::stride])
    drawn = scatter([(x, y) for x, y in points.tolist()], labels[::stride])
    return drawn + Markup('<p class="hint">{:.0%} and {:.0%} of the variance</p>').format(*shares)


def _origin(folder: Path, facts: Mapping) -> dict[str, Any]:
    """How the run came about: command, versions, configuration."""
    hints = []
    if "command" in facts:
        steps = ", ".join(f"{session['from_step']:,}" for session in facts["sessions"][1:])
        hints += [f"Interrupted, and continued from step {steps}."] if steps else []
        versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
        hints.append(f"{facts['machine']}; {versions}")
    config = folder / "config.yaml"
    text = config.read_text(encoding="utf-8") if config.exists() else ""
    return {"command": facts.get("command", ""), "hints": hints, "config": text}
