"""A comparison as a table for the terminal, as Markdown, as a self-contained HTML page and as numbers."""

from __future__ import annotations

import base64
import json
import math
import os
import secrets
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from jepa.comparison.results import Comparison, Correlation, Method, RunResult, Spread, spread
from jepa.config.catalogue import Choice, conf_folder
from jepa.reports.charts import NUM_COLOURS, Chart, Level, Line, line_chart, number
from jepa.reports.page import page
from jepa.reports.verdict import Column, series
from jepa.runs.metrics import MEDIA, write_atomically
from jepa.training.progress import duration

COSTS = ("steps", "samples", "time", "samples/s", "memory", "seeds")
WANDB = conf_folder() / "logger" / "wandb.yaml"
AXES = {"step": "Over steps", "sample": "Over samples seen", "second": "Over training time"}
SELECTION = (
    "Spearman's rank correlation between what is known without labels and each probe: 1 would choose the same run as "
    "the labels, 0 is chance. Evaluations of one run hang together, so their number is no sample size; over methods "
    "that predict different things, loss and prediction gain are not on one scale."
)


class TableRow(NamedTuple):
    title: str
    predicts: str
    cells: list[str]
    best: set[int]
    """places of the cells that are ahead of all other rows"""


def write(comparison: Comparison, folder: Path, name: str) -> str:
    """compare.md, compare.html and compare.json in the folder; returns the table for a terminal."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "compare.md", markdown(comparison, name))
    write_atomically(folder / "compare.html", html(comparison, folder, name))
    write_atomically(folder / "compare.json", json.dumps(numbers(comparison), indent=1) + "\n")
    return terminal(comparison)


def table(comparison: Comparison) -> tuple[list[str], list[TableRow]]:
    """Headings of the cells, and a row for each method, then for the baselines."""
    leaders = comparison.leaders()
    rows = []
    for place, method in enumerate(comparison.methods):
        best = {column for column, leader in enumerate(leaders) if leader == place}
        cells = list(map(_cell, comparison.values(method), comparison.columns))
        rows.append(TableRow(method.label, method.predicts, cells + _costs(method), best))
    for place, (title, values) in enumerate(comparison.baselines, start=len(rows)):
        best = {column for column, leader in enumerate(leaders) if leader == place}
        cells = list(map(_cell, values, comparison.columns))
        rows.append(TableRow(title, "nothing", cells + ["-"] * len(COSTS), best))
    return [column.head for column in comparison.columns] + list(COSTS), rows


def _cell(value: Spread | None, column: Column) -> str:
    if value is None:
        return "-"
    return f"{value.mean:.1f}" + (f" ± {value.deviation:.1f}" if value.deviation is not None else "") + column.unit


def _costs(method: Method) -> list[str]:
    values = costs(method)
    memory = values["memory_gib"]
    return [
        *(f"{found.mean:,.0f}" if (found := values[name]) else "-" for name in ("steps", "samples")),
        duration(values["seconds"].mean) if values["seconds"] else "-",
        number(values["samples_per_s"].mean) if values["samples_per_s"] else "-",
        f"{memory.mean:.2f} GiB" if memory else "-",
        str(len(method.runs)),
    ]


def costs(method: Method) -> dict[str, Spread | None]:
    """What the runs took: steps, samples, seconds of training, samples/s over all of it, peak memory."""
    ends = [run.clock[-1] for run in method.runs]
    return {
        "steps": spread(step for step, _, _ in ends),
        "samples": spread(samples for _, samples, _ in ends),
        "seconds": spread(seconds for _, _, seconds in ends),
        "samples_per_s": spread(samples / seconds for _, samples, seconds in ends if seconds > 0),
        "memory_gib": method.over_seeds(lambda run: run.memory),
    }


def terminal(comparison: Comparison) -> str:
    """Lines with headings; what is best is marked with *, what the methods predict stands below."""
    heads, rows = table(comparison)
    lines = [["", *heads]]
    lines += [[r.title, *(f"{cell}*" if i in r.best else cell for i, cell in enumerate(r.cells))] for r in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = [
        line[0].ljust(widths[0])
        + "".join(f"  {text:>{width}}" for text, width in zip(line[1:], widths[1:], strict=True))
        for line in lines
    ]
    shown += [f"{m.label} predicts {m.predicts}" for m in comparison.methods if m.predicts]
    marked = "* ahead of every other row by more than both deviations"
    return "\n".join(
        [*shown, *([marked] if any(row.best for row in rows) else []), comparison.budget, *comparison.notes]
    )


def markdown(comparison: Comparison, name: str) -> str:
    heads, rows = table(comparison)
    lines = [f"# {name}", "", _md(["", "predicts", *heads]), _md(["---", "---", *["---:"] * len(heads)])]
    for row in rows:
        lines.append(
            _md([row.title, row.predicts, *(f"**{c}**" if i in row.best else c for i, c in enumerate(row.cells))])
        )
    lines += ["", "Bold: ahead of every other row by more than both deviations.", "", comparison.budget]
    lines += ["", *(f"- {note}" for note in comparison.notes)]
    if comparison.correlations:
        heads, cells = _selection(comparison.correlations)
        lines += ["", "## Selection without labels", "", SELECTION, "", _md(["", *heads])]
        lines += [_md(["---", *["---:"] * len(heads)]), *map(_md, cells)]
    return "\n".join(lines) + "\n"


def _md(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _selection(correlations: Sequence[Correlation]) -> tuple[list[str], list[list[str]]]:
    """Headings, and a line of cells for each criterion: over runs and over evaluations, each with its n."""
    probes = list(dict.fromkeys(correlation.probe for correlation in correlations))
    found = {(c.criterion, c.probe): (c.over_runs, c.over_evaluations) for c in correlations}
    heads = [f"{probe}, over {what}" for what in ("runs", "evaluations") for probe in probes]
    lines = []
    for criterion in dict.fromkeys(correlation.criterion for correlation in correlations):
        pairs = [found[criterion, probe][part] if (criterion, probe) in found else (math.nan, 0)
                 for part in (0, 1) for probe in probes]  # fmt: skip
        lines.append([criterion, *(f"{rho:+.2f} (n={n})" if math.isfinite(rho) else f"- (n={n})" for rho, n in pairs)])
    return heads, lines


def numbers(comparison: Comparison) -> dict[str, Any]:
    """Everything that the table shows, unrounded, for a program to read."""
    named = [(column.metric, place) for place, column in enumerate(comparison.columns)]
    rows = {m.label: comparison.values(m) for m in comparison.methods} | dict(comparison.baselines)
    values = {title: {metric: _plain(row[place]) for metric, place in named} for title, row in rows.items()}
    return {
        "budget": comparison.budget,
        "notes": list(comparison.notes),
        "values": values,
        "costs": {m.label: {name: _plain(v) for name, v in costs(m).items()} for m in comparison.methods},
        "predicts": {method.label: method.predicts for method in comparison.methods},
        "runs": {m.label: {str(run.folder): run.config["seed"] for run in m.runs} for m in comparison.methods},
        "left_out": dict(comparison.left_out),
        "correlations": [
            c._asdict() | {part: {"rho": rho if math.isfinite(rho) else None, "n": n}
                           for part, (rho, n) in (("over_runs", c.over_runs), ("over_evaluations", c.over_evaluations))}
            for c in comparison.correlations
        ],
    }  # fmt: skip


def _plain(value: Spread | None) -> dict[str, Any] | None:
    return None if value is None else value._asdict()


def html(comparison: Comparison, folder: Path, name: str) -> str:
    heads, rows = table(comparison)
    lines = [
        f"<tr><th>{escape(row.title)}</th><td class='words'>{escape(row.predicts)}</td>"
        + "".join(f"<td>{_bold(cell, place in row.best)}</td>" for place, cell in enumerate(row.cells)) + "</tr>"
        for row in rows
    ]  # fmt: skip
    tone = "bad" if comparison.budget.startswith("NOT") else "good"
    notes = "".join(
        f"<li>{escape(note)}</li>"
        for note in ["Bold: ahead of every other row by more than both deviations.", *comparison.notes]
    )
    parts = [
        f'<header><h1>{escape(name)}</h1><span class="muted">jepa-compare</span></header>',
        f'<div class="card message {tone}"><span>{escape(comparison.budget)}</span></div>',
        "<h2>Result</h2>", _table(["", "predicts", *heads], lines),
        f"<ul class='lead'>{notes}</ul>",
        *(_charts(comparison, axis) for axis in AXES),
        _correlation_table(comparison), _pictures(comparison.methods), _runs(comparison, folder),
    ]  # fmt: skip
    return page(f"{name} - jepa-compare", parts)


def _bold(cell: str, is_best: bool) -> str:
    text = escape(cell).replace(" ", "&nbsp;")
    return f"<b>{text}</b>" if is_best else text


def _table(heads: Sequence[str], lines: Sequence[str]) -> str:
    head = "".join(f"<th{' class=words' * (text == 'predicts')}>{escape(text)}</th>" for text in heads)
    return (
        f'<div class="card scroll compared"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _charts(comparison: Comparison, axis: str) -> str:
    """A chart for each probe: a line per method, the mean over its seeds in a band from the lowest to the highest."""
    drawn = comparison.methods[:NUM_COLOURS]
    figures = []
    for column in comparison.probes:
        lines = [line for method in drawn if (line := curve(method, column.metric, axis)).points]
        place = comparison.columns.index(column)
        levels = [Level(name=title, value=v.mean) for title, values in comparison.baselines if (v := values[place])]
        figures.append(line_chart(Chart(title=column.head, unit="%", axis=axis), lines, levels))
    if not figures:
        return ""
    lead = "The mean of the seeds, in a band from the lowest to the highest."
    if len(drawn) < len(comparison.methods):
        lead += f" The first {len(drawn)} of {len(comparison.methods)} methods."
    return f'<h2>{AXES[axis]}</h2><p class="lead">{lead}</p><div class="charts">{"".join(figures)}</div>'


def curve(method: Method, metric: str, axis: str) -> Line:
    """The mean over the seeds at every step that all of them have evaluated, over steps, samples or seconds."""
    found = [dict(series(run.rows, metric)) for run in method.runs]
    found = [values for values in found if values]
    steps = sorted(set.intersection(*map(set, found))) if found else []
    points, band = [], []
    for step in steps:
        values = [each[step] for each in found]
        samples, seconds = (sum(x) / len(method.runs) for x in zip(*(run.at(step) for run in method.runs), strict=True))
        place = {"step": step, "sample": samples, "second": seconds}[axis]
        points.append((place, sum(values) / len(values)))
        band.append((min(values), max(values)))
    return Line(name=method.label, points=points, band=band)


def _correlation_table(comparison: Comparison) -> str:
    if not comparison.correlations:
        return ""
    heads, lines = _selection(comparison.correlations)
    shown = [
        f"<tr><th>{escape(line[0])}</th>{''.join(f'<td>{_bold(cell, False)}</td>' for cell in line[1:])}</tr>"
        for line in lines
    ]
    return f'<h2>Selection without labels</h2><p class="lead">{escape(SELECTION)}</p>{_table(["", *heads], shown)}'


def _pictures(methods: Sequence[Method]) -> str:
    """What each method predicts, as its first seed drew it at its last evaluation."""
    panels = []
    for method in methods:
        run = min(method.runs, key=lambda run: run.config["seed"])
        last = max(run.folder.glob(f"{MEDIA}/step_*"), default=None)
        for path in sorted(last.glob("reconstruction*.png")) if last else ():
            source = base64.b64encode(path.read_bytes()).decode()
            title = f"{escape(method.label)}, seed {run.config['seed']}"
            panels.append(
                f'<div class="card picture"><h3>{title}</h3>'
                f'<div class="pair"><img alt="{escape(path.stem)}" src="data:image/png;base64,{source}"></div></div>'
            )
    return f"<h2>Reconstructions</h2><div class='pictures'>{''.join(panels)}</div>" if panels else ""


def _runs(comparison: Comparison, folder: Path) -> str:
    lines = [_run_line(method, run, folder) for method in comparison.methods for run in method.runs]
    lines += [
        f"<tr><th>{escape(place)}</th><td colspan='3' class='words'>{escape(why)}</td></tr>"
        for place, why in comparison.left_out
    ]
    return f"<h2>Runs</h2>{_table(['', 'seed', 'training time', ''], lines)}"


def _run_line(method: Method, run: RunResult, folder: Path) -> str:
    link = Path(os.path.relpath(run.folder / "report.html", folder)).as_posix()
    seconds = duration(run.clock[-1][2])
    return (
        f"<tr><th>{escape(method.label)}</th><td>{run.config['seed']}</td><td>{seconds}</td>"
        f'<td><a href="{escape(link)}">report</a></td></tr>'
    )


def send_to_wandb(comparison: Comparison, folder: Path, name: str) -> None:
    """The table, and every probe of every method over its steps, as a run of its own with the members' settings."""
    from jepa.logger import WandbLogger

    run = comparison.methods[0].runs[0]
    given = (run.config.get("logger") or {}).get("wandb") or Choice("logger", "wandb", WANDB).values
    keys = {key.rpartition(".")[2]: value for key, value in given.items()}
    settings: dict[str, Any] = {key: keys[key] for key in ("project", "entity", "mode")}
    logger = WandbLogger(
        **settings, folder=folder, config={"name": name}, run_id=secrets.token_hex(4), resume_step=None
    )
    rows: dict[int, dict[str, float]] = {}
    for method in comparison.methods:
        for column in comparison.columns:
            for step, value in curve(method, column.metric, "step").points:
                rows.setdefault(int(step), {})[f"{method.label}/{column.metric.replace('/', '_')}"] = value
    for step in sorted(rows):
        logger.log(step, rows[step])
    heads, lines = table(comparison)
    logger.table(
        max(rows, default=0), "comparison", ["method", "predicts", *heads], [[r[0], r[1], *r[2]] for r in lines]
    )
    logger.close("finished")
