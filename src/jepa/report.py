"""report.html: what happened in a run, from its folder alone, in one file that needs no service, script or network."""

from __future__ import annotations

import base64
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import numpy as np

from jepa.charts import Chart, Level, Line, Point, line_chart, number, scatter
from jepa.folder_log import CAPTIONS, MEDIA, PROVENANCE, Row, read_json, read_rows, step_of, write_atomically
from jepa.verdict import REGRESSION, cell, table_columns, table_rows, verdict

TONES = {
    "finished": "good", "running": "calm", "stopped": "wait", "failed": "bad",
    "learning": "good", "stalled": "wait", "collapsing": "bad",
}  # fmt: skip
SIGNS = {"good": "&#10003;", "bad": "&#9888;", "wait": "&#9208;", "calm": "&#8943;"}
MAX_CLOUD = 600
HORIZON = re.compile(r"predict/(error|copy_error|trivial_error)_h(\d+)")
HORIZON_LINES = {"error": "predictor", "copy_error": "copy of the last step", "trivial_error": "mean target"}
MOTION_METRICS = re.compile(rf"still/.*|{REGRESSION.pattern}|predict/copy_error")


@dataclass(frozen=True, kw_only=True)
class Curve(Chart):
    """A chart of named metrics with their labels, and of baselines with theirs."""

    metrics: Mapping[str, str]
    baselines: Mapping[str, str] = field(default_factory=dict)
    starts: bool = False
    """the value at step 0, of the untrained encoder, is a baseline too"""
    factor: float = 1.0


MOTION = "Is motion learned?"
SECTIONS: dict[str, tuple[str, Sequence[Curve]]] = {
    "Is it learning?": (
        "Probes are fitted on frozen features of the target encoder and scored on images they were not fitted on.",
        (
            Curve(
                title="Linear probe, top-1", starts=True, unit="%",
                metrics={"probe/linear_top1": "trained", "still/linear_top1": "middle frame only"},
                baselines={"baseline/pixels_linear_top1": "raw pixels"},
                hint="Useful features rise clearly above both baselines.",
            ),
            Curve(
                title="kNN probe, top-1", starts=True, unit="%",
                metrics={"probe/knn_top1": "trained", "still/knn_top1": "middle frame only"},
                baselines={"baseline/pixels_knn_top1": "raw pixels"},
                hint="Nothing is fitted here: the neighbours of a sample vote.",
            ),
            Curve(
                title="Attentive probe, top-1", starts=True, unit="%",
                metrics={"probe/attentive_top1": "trained", "still/attentive_top1": "middle frame only"},
                hint="A learned query reads the tokens, so that nothing is lost by averaging them.",
            ),
            Curve(
                title="Balanced accuracy", starts=True, unit="%",
                metrics={
                    "probe/linear_balanced": "linear", "probe/knn_balanced": "kNN",
                    "probe/attentive_balanced": "attentive", "still/linear_balanced": "linear, middle frame",
                },
                baselines={"baseline/pixels_linear_balanced": "raw pixels, linear"},
                hint="The mean over the classes, which are uneven here: always naming the largest gains nothing.",
            ),
            Curve(
                title="Prediction error", may_be_log=True,
                metrics={
                    "predict/error": "predictor", "predict/trivial_error": "mean target",
                    "predict/copy_error": "copy of the last step",
                },
                hint="The predictor must beat the trivial answers; all near zero is a collapse.",
            ),
        ),
    ),
    MOTION: (
        "Motion is learned where the probes of whole clips rise above those of their middle frame, and where the "
        "prediction beats a copy of what was seen last.",
        (
            Curve(
                title="Gain over trivial predictions",
                metrics={"predict/copy_gain": "over a copy of the last step", "predict/gain": "over the mean target"},
                hint="1 is a perfect prediction, 0 is no better than the trivial one.",
            ),
        ),
    ),
    "Is it collapsing?": (
        "A collapsed encoder gives every image nearly the same vector; its loss looks best of all.",
        (
            Curve(
                title="Effective rank", metrics={"collapse/rank_centred": "centred", "collapse/rank": "raw"},
                baselines={"baseline/pixels_rank": "raw pixels, raw"},
                hint="Directions in use. The centred rank near 1 is collapse; a falling one is its beginning.",
            ),
            Curve(
                title="Spread of the features", may_be_log=True,
                metrics={"collapse/std": "mean std", "collapse/std_min": "smallest std"},
                hint="Standard deviation of a dimension over images. Towards zero is collapse.",
            ),
            Curve(
                title="Mean cosine between images", metrics={"collapse/cosine": "cosine"},
                hint="1 means that all images point the same way.",
            ),
        ),
    ),
    "Selection without labels": (
        "To choose between checkpoints or runs where there are no labels; compare runs of one kind, and with the "
        "effective rank and the gain over trivial predictions.",
        (
            Curve(
                title="LiDAR", metrics={"select/lidar": "LiDAR"},
                hint="Directions that tell images apart beyond crops of one. Meant to rise, seen to fall in good runs.",
            ),
            Curve(
                title="Exponent of the eigenvalues", metrics={"select/alpha": "alpha"},
                hint="alpha-ReQ. Near 1 is best: far above, few directions matter; far below, noise does.",
            ),
        ),
    ),
    "Training": (
        "The pretraining loss is no measure of progress: down and then up again is healthy.",
        (
            Curve(
                title="Loss", metrics={"train/loss": "loss"}, may_be_log=True,
                hint="A sudden drop can be a partial collapse: compare with rank and spread.",
            ),
            Curve(title="Gradient norm", metrics={"train/grad_norm": "before clipping"}, may_be_log=True),
            Curve(title="Learning rate", metrics={"train/lr": "lr"}),
            Curve(title="Weight decay", metrics={"train/weight_decay": "weight decay"}),
            Curve(title="Momentum of the target encoder", metrics={"train/momentum": "momentum"}),
        ),
    ),
    "Speed": (
        "",
        (
            Curve(title="Throughput", metrics={"perf/samples_per_s": "samples"}, unit="samples/s"),
            Curve(
                title="Waiting for data", metrics={"perf/data_wait": "of the time"}, unit="%", factor=100,
                hint="Above a few percent, the loader is what limits the speed: raise num_workers.",
            ),
            Curve(title="Peak memory", metrics={"perf/peak_memory_gib": "so far"}, unit="GiB"),
        ),
    ),
}  # fmt: skip


def write_report(folder: Path) -> Path:
    """Write FOLDER/report.html from what lies in the folder; readers see the old report or the new one."""
    folder = Path(folder)
    rows = read_rows(folder)
    facts = read_json(folder / PROVENANCE)
    ended = read_json(folder / "run.json")
    status, message = _status(facts, ended)
    name = str(facts.get("name", folder.name))
    parts = [
        _header(name, status),
        _verdict(rows),
        _message(status, message),
        _facts(rows, facts),
        _table(rows),
        *_curves(rows),
        _pictures(folder),
        _origin(folder, facts),
    ]
    target = folder / "report.html"
    write_atomically(target, page(f"{name} - jepa-train", parts))
    return target


def page(title: str, parts: Sequence[str]) -> str:
    """A whole HTML file in the style of the report; empty parts are left out."""
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style></head>\n"
        f"<body><main>\n{''.join(part + chr(10) for part in parts if part)}</main></body></html>\n"
    )


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


def _verdict(rows: Sequence[Row]) -> str:
    judged = verdict(rows)
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


def _table(rows: Sequence[Row]) -> str:
    compared = [(title, values) for title, values in table_rows(rows) if any(value is not None for value in values)]
    if not compared:
        return ""
    columns = table_columns(rows)
    lines = []
    for title, values in compared:
        cells = "".join(f"<td>{cell(v, c).replace(' ', '&nbsp;')}</td>" for v, c in zip(values, columns, strict=True))
        style = ' class="trained"' if title.startswith("trained encoder") else ""
        lines.append(f"<tr{style}><th>{escape(title)}</th>{cells}</tr>")
    heads = "".join(f"<th>{escape(column.head)}</th>" for column in columns)
    return (
        f'<h2>Result</h2><div class="card scroll"><table><thead><tr><th></th>{heads}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _curves(rows: Sequence[Row]) -> list[str]:
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
        drawn = [_chart(curve, columns) for curve in curves if metrics & set(curve.metrics)]
        metrics -= {name for curve in curves for name in curve.metrics}
        if title == MOTION:
            drawn.append(_horizons(columns))
            metrics = {name for name in metrics if not HORIZON.fullmatch(name)}
        if drawn:
            lead = f'<p class="lead">{escape(lead)}</p>' if lead else ""
            parts.append(f'<h2>{escape(title)}</h2>{lead}<div class="charts">{"".join(drawn)}</div>')
    others = [_chart(Curve(title=name, metrics={name: name}), columns) for name in sorted(metrics)]
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


def _chart(curve: Curve, columns: Mapping[str, list[Point]]) -> str:
    lines = [
        Line(name=label, points=[(step, value * curve.factor) for step, value in columns[name]])
        for name, label in curve.metrics.items()
        if name in columns
    ]
    levels = []
    if curve.starts and lines[0].points[0][0] == 0:
        levels.append(Level(name="untrained", value=lines[0].points[0][1]))
    for name, label in curve.baselines.items():
        levels += [Level(name=label, value=value) for _, value in columns.get(name, [])[-1:]]
    return line_chart(curve, lines, levels)


def _pictures(folder: Path) -> str:
    """Pictures and embeddings of the latest evaluation, beside those of step 0 where they differ."""
    last = max(folder.glob(f"{MEDIA}/step_*"), default=None)
    if last is None:
        return ""
    captions = read_json(last / CAPTIONS)
    order = {name: place for place, name in enumerate(captions)}
    paths = sorted(last.glob("*.png"), key=lambda path: order.get(path.stem, len(order)))
    parts = [_panel(path, _picture, captions.get(path.stem, "")) for path in paths]
    text = (
        "Features of images on their two main directions, each evaluation on its own; under the pointer, their labels."
    )
    parts += [_panel(path, _cloud, text) for path in sorted(last.glob("*.npz"))]
    return f"<h2>Pictures</h2><div class='pictures'>{''.join(parts)}</div>"


def _panel(path: Path, draw: Callable[[Path], str], caption: str) -> str:
    before = path.parent.with_name("step_00000000") / path.name
    shown = [path]
    if before != path and before.exists() and before.read_bytes() != path.read_bytes():
        shown.insert(0, before)
    figures = "".join(f"<figure><figcaption>{_moment(p)}</figcaption>{draw(p)}</figure>" for p in shown)
    title = escape(path.stem.replace("_", " ").capitalize())
    hint = f'<p class="hint">{escape(caption)}</p>'
    width = "wide" if len(shown) > 1 else ""
    return f'<div class="card picture {width}"><h3>{title}</h3><div class="pair">{figures}</div>{hint}</div>'


def _moment(path: Path) -> str:
    step = step_of(path.parent)
    return f"step {step:,}" + (" (untrained)" if step == 0 else "")


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


def principal_plane(vectors: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """[n, D] -> [n, 2], the two main directions, and their shares of the variance."""
    centred = vectors.astype(np.float64) - vectors.mean(axis=0, dtype=np.float64)
    left, singular, _ = np.linalg.svd(centred, full_matrices=False)
    total = max(float((singular**2).sum()), 1e-30)
    plane = np.pad(left[:, :2] * singular[:2], ((0, 0), (0, max(0, 2 - len(singular)))))
    return plane, [float(s**2) / total for s in [*singular[:2], 0.0][:2]]


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
