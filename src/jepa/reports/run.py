"""report.html: the report of a run, made from its folder alone; one file without scripts or external resources."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from jepa.config.run_data import describe_data
from jepa.errors import FileError
from jepa.reports.charts import Chart, Line, Point, ReferenceLine, line_chart, number, scatter
from jepa.reports.page import Table, picture, principal_plane, render
from jepa.reports.run_table import Column, table_columns, table_rows
from jepa.reports.sections import DETECTION, MOTION, SECTIONS, SELECTION, TRAINING, Curve, class_curves, probe_curve
from jepa.reports.text import duration
from jepa.reports.verdict import (
    CLASSIFIED,
    CONSTANT,
    DETECTED,
    NOT_MEASURED,
    RAW_PIXELS,
    REGRESSION,
    UNTRAINED,
    Rows,
    initial_weights,
    verdict,
)
from jepa.runs.metrics import (
    MEDIA,
    PROTOCOL,
    clock,
    read_captions,
    read_config,
    read_ending,
    read_provenance,
    read_rows,
    step_of,
    write_atomically,
)

TONES = {
    "finished": "good", "running": "calm", "stopped": "wait", "failed": "bad",
    "learning": "good", "stalled": "wait", "collapsing": "bad", "unclear": "wait",
    RAW_PIXELS: "wait", CONSTANT: "wait",
}  # fmt: skip
SIGNS = {"good": "\u2713", "bad": "\u26a0", "wait": "\u25cb", "calm": "\u22ef"}
MAX_EMBEDDED = 600
"""Number of vectors in the scatter plot of an embedding."""
EMBEDDING_CAPTION = "Features of images on their two main directions, which differ by step; labels under the pointer."
HORIZON_LINES = {
    "error": "predictor", "copy_error": "copy of the last step", "trivial_error": "mean target",
    "shuffled_error": "predictor, actions of other samples",
}  # fmt: skip
HORIZON = re.compile(rf"predict/({'|'.join(HORIZON_LINES)})_h(\d+)")
MOTION_METRICS = re.compile(rf"still/.*|{REGRESSION.pattern}|predict/copy_error")
Section = tuple[str, str, list[Markup]]
"""Title, introduction, charts."""
Panel = tuple[str, list[tuple[str, Markup, str]], str]
"""Title, pictures with their steps and captions, caption that all share."""


def write_report(folder: Path) -> Path:
    """Write FOLDER/report.html from the files of the run; readers see the old report or the new one."""
    folder = Path(folder)
    rows = read_rows(folder)
    provenance = read_provenance(folder)
    run = {"status": "running", "message": ""} | read_ending(folder)
    status, message = run["status"], run["message"]
    if status == "running":  # the process may have ended before it could write run.json
        status = provenance.get("status", status)
    config: dict = {}
    with suppress(FileError):  # edited by hand: it is shown as it is
        config = read_config(folder)
    initial = initial_weights(config)
    judgement = verdict(rows, initial)
    verdict_tone = TONES.get(judgement.word, "calm")
    result = final_table(rows, initial)
    result = replace(result, rows=[row for row in result.rows if set(row[1:]) != {NOT_MEASURED}])
    sections, folded = _charts(rows, initial)
    page = render(
        "run.html", name=str(provenance.get("name", folder.name)), status=status, tone=TONES.get(status, "calm"),
        verdict=judgement, verdict_tone=verdict_tone, sign=SIGNS[verdict_tone],
        message=message if not message or message.startswith(status) else f"{status}: {message}",
        facts=_facts(rows, provenance, config), result=result, sections=sections, folded=folded,
        result_style="trained" if result.rows and result.rows[-1][0].startswith("trained") else "",
        panels=_panels(folder, initial), **_origin(folder, provenance),
    )  # fmt: skip
    target = folder / "report.html"
    write_atomically(target, page)
    return target


def _facts(rows: Rows, provenance: Mapping, config: Mapping) -> dict[str, str]:
    """Names and values of the facts at the top of the page."""
    last, seconds = {name: value for row in rows for name, value in row.items()}, clock(rows)[-1][2]
    known = {
        "data": describe_data(config.get("dataset") or {}), "device": provenance.get("device", ""),
        "training time": duration(seconds) if seconds else "", "steps": f"{last['step']:,}" if rows else "",
    }  # fmt: skip
    facts = {name: text for name, text in known.items() if text}
    if "epoch" in last:
        facts["epochs"] = number(last["epoch"])
    if "samples" in last:
        facts["samples"] = f"{last['samples']:,.0f}"
    if math.isfinite(last.get("perf/samples_per_s", math.nan)):
        facts["samples/s"] = number(last["perf/samples_per_s"])
    if provenance.get("sessions"):
        facts["started"] = _time(provenance["sessions"][0]["started"])
    return facts | {"written": _time(time.time())}


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def final_table(rows: Rows, initial: str = UNTRAINED) -> Table:
    """A table of the encoder of step 0, raw pixels and the trained encoder."""
    columns = table_columns(rows)
    lines = [[title, *map(Column.cell, columns, values)] for title, values in table_rows(rows, initial)]
    return Table(heads=["", *(column.head for column in columns)], rows=lines)


def _charts(rows: Rows, initial: str) -> tuple[list[Section], list[Section]]:
    """The sections, and folded ones of what tells less: criteria without labels, constant curves, other metrics."""
    columns: dict[str, list[Point]] = {}
    for row in rows:
        for name, value in row.items():
            columns.setdefault(name, []).append((row["step"], value))
    metrics = {name for name in columns if "/" in name and not name.startswith("baseline/")}
    sections, folded, constant = [], [], []
    for title, (lead, curves) in SECTIONS.items():
        if title == MOTION:
            if not any(MOTION_METRICS.fullmatch(name) for name in metrics):
                continue
            curves = [*_regressions(columns), *curves]
        if title == DETECTION:
            curves = [*curves, *class_curves(columns)]
        if title == TRAINING and columns.keys() & {CLASSIFIED, *DETECTED}:
            lead = ""  # it is not true of supervised losses
        curves = [curve for curve in curves if metrics & set(curve.metrics)]
        constant += [curve for curve in curves if _is_constant(curve, columns)]
        charts = [_chart(curve, columns, initial) for curve in curves if curve not in constant]
        metrics -= {name for curve in curves for name in curve.metrics}
        if title == MOTION:
            charts += _horizons(columns)
            metrics = {name for name in metrics if not HORIZON.fullmatch(name)}
        if charts:
            is_minor = title == SELECTION and any(name.startswith("probe/") for name in columns)
            (folded if is_minor else sections).append((title, lead, charts))
    others = [*constant, *(Curve(title=name, metrics={name: name}) for name in sorted(metrics))]
    if others:
        title = f"{len(others)} more curve{'s' * (len(others) > 1)}"
        folded.append((title, "", [_chart(curve, columns, initial) for curve in others]))
    return sections, folded


def _is_constant(curve: Curve, columns: Mapping[str, list[Point]]) -> bool:
    """Whether a chart of several points shows level lines alone; a probe that does not move is a result."""
    lines = [[value for _, value in columns[name]] for name in curve.metrics if name in columns]
    return not curve.with_start and all(len(line) > 1 and min(line) == max(line) for line in lines)


def _regressions(names: Iterable[str]) -> list[Curve]:
    """A chart for each regression probe."""
    groups = [match[1] for name in names if (match := REGRESSION.fullmatch(name))]
    hint = "Variance explained by ridge regression on the features; below 0, the mean predicts better."
    return [probe_curve(f"{group}_r2", f"{group.replace('_', ' ').capitalize()} probe, R²", hint) for group in groups]


def _horizons(columns: Mapping[str, list[Point]]) -> list[Markup]:
    """A chart of the last evaluation's errors over the steps ahead; none for fewer than two steps."""
    errors: dict[str, list[Point]] = {}
    for name, points in columns.items():
        if match := HORIZON.fullmatch(name):
            errors.setdefault(match[1], []).append((int(match[2]), points[-1][1]))
    if max(map(len, errors.values()), default=0) < 2:
        return []
    lines = [Line(name=label, points=sorted(errors[kind])) for kind, label in HORIZON_LINES.items() if kind in errors]
    chart = Chart(
        title="Prediction error over the horizon", axis="horizon",
        hint="At the last evaluation, in time steps of the encoder after the last visible one.",
    )  # fmt: skip
    return [line_chart(chart, lines)]


def _chart(curve: Curve, columns: Mapping[str, list[Point]], initial: str) -> Markup:
    lines = [
        Line(name=label, points=[(step, value * curve.factor) for step, value in columns[name]])
        for name, label in curve.metrics.items()
        if name in columns
    ]
    first_step, start = lines[0].points[0]
    baselines = [ReferenceLine(name=initial, value=start)] if curve.with_start and first_step == 0 else []
    for name, label in curve.baselines.items():
        baselines += [ReferenceLine(name=label, value=value) for _, value in columns.get(name, [])[-1:]]
    return line_chart(curve, lines, baselines)


def _panels(folder: Path, initial: str) -> list[Panel]:
    """Pictures and embeddings of the latest evaluation, beside those of step 0 if they differ."""
    last = max(folder.glob(f"{MEDIA}/step_*"), default=None)
    if last is None:
        return []
    captions = read_captions(last)
    order = {name: index for index, name in enumerate(captions)}
    paths = sorted(last.glob("*.png"), key=lambda path: order.get(path.stem, len(order)))
    panels = [_panel(path, picture, "", initial) for path in paths]
    return panels + [_panel(path, _embedding, EMBEDDING_CAPTION, initial) for path in sorted(last.glob("*.npz"))]


def _panel(path: Path, draw: Callable[[Path], Markup], caption: str, initial: str) -> Panel:
    """Without `caption` the pictures have those of their steps, or one if it is the same."""
    paths = [path]
    first = path.parent.with_name("step_00000000") / path.name
    if first != path and first.exists() and first.read_bytes() != path.read_bytes():
        paths.insert(0, first)
    steps = [step_of(path.parent) for path in paths]
    titles = [f"step {step:,} ({initial})" if step == 0 else f"step {step:,}" for step in steps]
    captions = [caption or read_captions(path.parent).get(path.stem, "") for path in paths]
    own, shared = (captions, "") if len(set(captions)) > 1 else ([""] * len(paths), captions[0])
    return path.stem.replace("_", " ").capitalize(), list(zip(titles, map(draw, paths), own, strict=True)), shared


def _embedding(path: Path) -> Markup:
    with np.load(path) as arrays:
        vectors, labels = arrays["vectors"], arrays["labels"].tolist()
    if len(vectors) < 3 or not np.isfinite(vectors).all():
        return Markup('<p class="empty">nothing to draw: fewer than three vectors, or not finite</p>')
    stride = math.ceil(len(vectors) / MAX_EMBEDDED)
    points, shares = principal_plane(vectors[::stride])
    plot = scatter([(x, y) for x, y in points.tolist()], labels[::stride])
    return plot + Markup('<p class="hint">{:.0%} and {:.0%} of the variance</p>').format(*shares)


def _origin(folder: Path, provenance: Mapping) -> dict[str, Any]:
    """Command, versions and configuration of the run."""
    hints = []
    if "command" in provenance:
        steps = ", ".join(f"{session['from_step']:,}" for session in provenance.get("sessions", ())[1:])
        hints += [f"Continued from step {steps}."] if steps else []
        versions = ", ".join(f"{name} {version}" for name, version in provenance.get("versions", {}).items())
        hints.append(f"{provenance.get('machine', 'unknown machine')}; {versions}")
    config = folder / "config.yaml"
    text = config.read_text(encoding="utf-8", errors="replace") if config.exists() else ""
    protocol = folder / PROTOCOL
    methods = protocol.read_text(encoding="utf-8", errors="replace").splitlines() if protocol.exists() else []
    return {"command": provenance.get("command", ""), "hints": hints, "config": text, "protocol": methods}
