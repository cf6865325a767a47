"""report.html: what happened in a run, from its folder alone, in one file that needs no service, script or network."""

from __future__ import annotations

import base64
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from html import escape
from pathlib import Path

import numpy as np
import yaml

from jepa.reports.charts import Chart, Level, Line, Point, line_chart, number, scatter
from jepa.reports.page import page, principal_plane
from jepa.reports.sections import DETECTION, MOTION, SECTIONS, TRAINING, Curve, class_curves
from jepa.reports.verdict import CLASSIFIED, DETECTED, REGRESSION, cell, start_of, table_columns, table_rows, verdict
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
SIGNS = {"good": "&#10003;", "bad": "&#9888;", "wait": "&#9208;", "calm": "&#8943;"}
MAX_CLOUD = 600
HORIZON = re.compile(r"predict/(error|copy_error|trivial_error)_h(\d+)")
HORIZON_LINES = {"error": "predictor", "copy_error": "copy of the last step", "trivial_error": "mean target"}
MOTION_METRICS = re.compile(rf"still/.*|{REGRESSION.pattern}|predict/copy_error")


def write_report(folder: Path) -> Path:
    """Write FOLDER/report.html from what lies in the folder; readers see the old report or the new one."""
    folder = Path(folder)
    rows = read_rows(folder)
    facts = read_json(folder / PROVENANCE)
    ended = read_json(folder / "run.json")
    config: dict = {}
    with suppress(yaml.YAMLError):  # edited by hand: it is shown as it is
        config = read_config(folder)
    start = start_of(config)
    status, message = _status(facts, ended)
    name = str(facts.get("name", folder.name))
    parts = [
        _header(name, status),
        _verdict(rows, start),
        _message(status, message),
        _facts(rows, facts),
        _table(rows, start),
        *_curves(rows, start),
        _pictures(folder, start),
        _origin(folder, facts),
    ]
    target = folder / "report.html"
    write_atomically(target, page(f"{name} - jepa-train", parts))
    return target


def _status(facts: Mapping, ended: Mapping) -> tuple[str, str]:
    """How the run stands: run.json is the authority, the logger knows where a process had no time to write it."""
    status, message = ended.get("status", "running"), str(ended.get("message", ""))
    return (facts.get("status", status) if status == "running" else status), message


def _header(name: str, status: str) -> str:
    return (
        f'<header><h1>{escape(name)}</h1><span class="status {TONES.get(status, "calm")}">{escape(status)}</span>'
        '<span class="muted">jepa-train report</span></header>'
    )


def _message(status: str, message: str) -> str:
    if not message:
        return ""
    text = message if message.startswith(status) else f"{status}: {message}"
    return f'<div class="card message {TONES.get(status, "calm")}"><span>{escape(text)}</span></div>'


def _verdict(rows: Sequence[Row], start: str) -> str:
    judged = verdict(rows, start)
    tone = TONES.get(judged.word, "calm")
    return (
        f'<div class="card verdict {tone}"><strong>{SIGNS[tone]} {escape(judged.word)}</strong>'
        f"<p>{escape(judged.reason[:1].upper() + judged.reason[1:])}</p></div>"
    )


def _facts(rows: Sequence[Row], facts: Mapping) -> str:
    last: Row = {name: value for row in rows for name, value in row.items()}
    shown = []
    if rows:
        shown += [("steps", f"{last['step']:,}")]
        shown += [("epochs", number(last["epoch"]))] if "epoch" in last else []
        shown += [("samples", f"{last['samples']:,.0f}")] if "samples" in last else []
    if math.isfinite(last.get("perf/samples_per_s", math.nan)):
        shown.append(("samples/s", number(last["perf/samples_per_s"])))
    if facts.get("sessions"):
        shown.append(("started", _time(facts["sessions"][0]["started"])))
    shown.append(("written", _time(time.time())))
    return f'<dl class="facts">{"".join(f"<div><dt>{k}</dt><dd>{v}</dd></div>" for k, v in shown)}</dl>'


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _table(rows: Sequence[Row], start: str) -> str:
    compared = [
        (title, values) for title, values in table_rows(rows, start) if any(value is not None for value in values)
    ]
    if not compared:
        return ""
    columns = table_columns(rows)
    lines = []
    for title, values in compared:
        cells = "".join(f"<td>{cell(v, c).replace(' ', '&nbsp;')}</td>" for v, c in zip(values, columns, strict=True))
        style = ' class="trained"' if re.match("trained (encoder|detector|classifier)", title) else ""
        lines.append(f"<tr{style}><th>{escape(title)}</th>{cells}</tr>")
    heads = "".join(f"<th>{escape(column.head)}</th>" for column in columns)
    return (
        f'<h2>Result</h2><div class="card scroll"><table><thead><tr><th></th>{heads}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _curves(rows: Sequence[Row], start: str) -> list[str]:
    """The sections, and behind a fold every other metric, so that nothing logged is hidden."""
    columns: dict[str, list[Point]] = {}
    for row in rows:
        for name, value in row.items():
            columns.setdefault(name, []).append((row["step"], value))
    metrics = {name for name in columns if "/" in name and not name.startswith("baseline/")}
    parts = []
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
            drawn.append(_horizons(columns))
            metrics = {name for name in metrics if not HORIZON.fullmatch(name)}
        if drawn:
            lead = f'<p class="lead">{escape(lead)}</p>' if lead else ""
            parts.append(f'<h2>{escape(title)}</h2>{lead}<div class="charts">{"".join(drawn)}</div>')
    others = [_chart(Curve(title=name, metrics={name: name}), columns, start) for name in sorted(metrics)]
    if others:
        count = f"{len(others)} more curve{'s' if len(others) > 1 else ''}"
        parts.append(f'<details><summary>{count}</summary><br><div class="charts">{"".join(others)}</div></details>')
    return parts


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


def _horizons(columns: Mapping[str, list[Point]]) -> str:
    """Errors of the last evaluation over the number of steps ahead; nothing where there is only one."""
    last: dict[str, list[Point]] = {}
    for name, points in columns.items():
        if found := HORIZON.fullmatch(name):
            last.setdefault(found[1], []).append((int(found[2]), points[-1][1]))
    if max((len(points) for points in last.values()), default=0) < 2:
        return ""
    lines = [Line(name=HORIZON_LINES[kind], points=sorted(last[kind])) for kind in HORIZON_LINES if kind in last]
    chart = Chart(
        title="Prediction error over the horizon", axis="horizon",
        hint="Of the last evaluation, in time steps of the encoder after the last one seen.",
    )  # fmt: skip
    return line_chart(chart, lines)


def _chart(curve: Curve, columns: Mapping[str, list[Point]], start: str) -> str:
    lines = [
        Line(name=label, points=[(step, value * curve.factor) for step, value in columns[name]])
        for name, label in curve.metrics.items()
        if name in columns
    ]
    levels = []
    if curve.starts and lines[0].points[0][0] == 0:
        levels.append(Level(name=start, value=lines[0].points[0][1]))
    for name, label in curve.baselines.items():
        levels += [Level(name=label, value=value) for _, value in columns.get(name, [])[-1:]]
    return line_chart(curve, lines, levels)


def _pictures(folder: Path, start: str) -> str:
    """Pictures and embeddings of the latest evaluation, beside those of step 0 where they differ."""
    last = max(folder.glob(f"{MEDIA}/step_*"), default=None)
    if last is None:
        return ""
    captions = read_json(last / CAPTIONS)
    order = {name: place for place, name in enumerate(captions)}
    paths = sorted(last.glob("*.png"), key=lambda path: order.get(path.stem, len(order)))
    parts = [_panel(path, _picture, captions.get(path.stem, ""), start) for path in paths]
    text = (
        "Features of images on their two main directions, each evaluation on its own; under the pointer, their labels."
    )
    parts += [_panel(path, _cloud, text, start) for path in sorted(last.glob("*.npz"))]
    return f"<h2>Pictures</h2><div class='pictures'>{''.join(parts)}</div>"


def _panel(path: Path, draw: Callable[[Path], str], caption: str, start: str) -> str:
    before = path.parent.with_name("step_00000000") / path.name
    shown = [path]
    if before != path and before.exists() and before.read_bytes() != path.read_bytes():
        shown.insert(0, before)
    figures = "".join(f"<figure><figcaption>{_moment(p, start)}</figcaption>{draw(p)}</figure>" for p in shown)
    title = escape(path.stem.replace("_", " ").capitalize())
    hint = f'<p class="hint">{escape(caption)}</p>'
    width = "wide" if len(shown) > 1 else ""
    return f'<div class="card picture {width}"><h3>{title}</h3><div class="pair">{figures}</div>{hint}</div>'


def _moment(path: Path, start: str) -> str:
    step = step_of(path.parent)
    return f"step {step:,}" + (f" ({start})" if step == 0 else "")


def _picture(path: Path) -> str:
    source = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    return f'<img alt="{escape(path.stem)}" src="{source}">'


def _cloud(path: Path) -> str:
    with np.load(path) as arrays:
        vectors, labels = arrays["vectors"], arrays["labels"].tolist()
    if len(vectors) < 3 or not np.isfinite(vectors).all():
        return '<p class="empty">nothing to draw: fewer than three vectors, or not finite</p>'
    stride = math.ceil(len(vectors) / MAX_CLOUD)
    points, shares = principal_plane(vectors[::stride])
    drawn = scatter([(x, y) for x, y in points.tolist()], labels[::stride])
    return f'{drawn}<p class="hint">{shares[0]:.0%} and {shares[1]:.0%} of the variance</p>'


def _origin(folder: Path, facts: Mapping) -> str:
    """How the run came about: command, versions, configuration."""
    parts = []
    if "command" in facts:
        parts.append(f"<h2>Run it again</h2><div class='card'><pre>{escape(facts['command'])}</pre>")
        resumed = [session["from_step"] for session in facts["sessions"][1:]]
        if resumed:
            steps = ", ".join(f"{step:,}" for step in resumed)
            parts.append(f'<p class="hint">Interrupted, and continued from step {steps}.</p>')
        versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
        parts.append(f'<p class="hint">{escape(facts["machine"])}; {escape(versions)}</p></div>')
    config = folder / "config.yaml"
    if config.exists():
        text = escape(config.read_text(encoding="utf-8"))
        parts.append(f"<details><summary>Configuration</summary><pre>{text}</pre></details>")
    return "".join(parts)
