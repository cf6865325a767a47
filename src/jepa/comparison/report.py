"""A comparison for the terminal, as Markdown, as a self-contained page and as numbers."""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from markupsafe import Markup

from jepa.comparison.headline import headline
from jepa.comparison.results import Comparison, Correlation, Method, Spread, spread
from jepa.config.catalogue import Choice, conf_folder
from jepa.reports.charts import NUM_COLOURS, Chart, Line, ReferenceLine, line_chart, number
from jepa.reports.page import Table, bullets, escape_markdown, picture, render
from jepa.reports.text import duration
from jepa.reports.verdict import NOT_MEASURED, series
from jepa.runs.metrics import MEDIA, write_atomically

COSTS = {
    "steps": "{:,.0f}".format, "samples": "{:,.0f}".format, "time": duration, "samples/s": number,
    "memory": "{:.2f} GiB".format,
}  # fmt: skip
"""Heads of the columns of `costs` with the formats of their values."""
WANDB = conf_folder() / "logger" / "wandb.yaml"
AXES = {"step": "Over steps", "sample": "Over samples seen", "second": "Over training time"}
BOLD = "Bold: ahead of every other row by more than both deviations."
SELECTION = (
    "Spearman's rank correlation of each criterion without labels with each probe: 1 selects the same run as the "
    "labels, 0 is chance. Evaluations of one run are not independent, so their number is no sample size; loss and "
    "prediction gain are not comparable between methods with different targets."
)


def write(comparison: Comparison, folder: Path, name: str) -> str:
    """Write compare.md, compare.html and compare.json to the folder; returns the text for the terminal."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "compare.md", markdown(comparison, name))
    write_atomically(folder / "compare.html", html(comparison, folder, name))
    write_atomically(folder / "compare.json", json.dumps(numbers(comparison), indent=1) + "\n")
    return terminal(comparison)


def table(comparison: Comparison, *, with_predicted: bool = True) -> Table:
    """A row for each method, then for the baselines; a column for what a method predicts only if that differs."""
    with_predicted = with_predicted and len({method.predicts for method in comparison.methods}) > 1
    titles = [[method.label, method.predicts] for method in comparison.methods]
    titles += [[title, "nothing"] for title, _ in comparison.baselines]
    values = [*map(comparison.values, comparison.methods), *(values for _, values in comparison.baselines)]
    heads = [*COSTS, "seeds"]
    costs = [*map(_format_costs, comparison.methods), *[[NOT_MEASURED] * len(heads) for _ in comparison.baselines]]
    first, columns = 2 if with_predicted else 1, comparison.columns
    cells = [
        [column.cell(v.mean, v.deviation) if v else NOT_MEASURED for column, v in zip(columns, row, strict=True)]
        for row in values
    ]
    return Table(
        heads=[*["", "predicts"][:first], *(column.head for column in columns), *heads],
        rows=[[*title[:first], *row, *cost] for title, row, cost in zip(titles, cells, costs, strict=True)],
        text_columns={1} if with_predicted else (),
        best={(row, first + column) for column, row in enumerate(comparison.leaders()) if row is not None},
    )


def _format_costs(method: Method) -> list[str]:
    values = zip(COSTS.values(), costs(method).values(), strict=True)
    return [*(text(value.mean) if value else NOT_MEASURED for text, value in values), str(len(method.runs))]


def costs(method: Method) -> dict[str, Spread | None]:
    """Steps, samples, seconds of training, samples/s and peak memory in GiB, over the seeds."""
    ends = [run.clock[-1] for run in method.runs]
    memory = [[value for _, value in series(run.rows, "perf/peak_memory_gib")] for run in method.runs]
    return {
        "steps": spread(step for step, _, _ in ends),
        "samples": spread(samples for _, samples, _ in ends),
        "seconds": spread(seconds for _, _, seconds in ends),
        "samples_per_s": spread(samples / seconds for _, samples, seconds in ends if seconds > 0),
        "memory_gib": spread(max(values, default=None) for values in memory),
    }


def terminal(comparison: Comparison) -> str:
    """Which method is ahead, the table, and below it what the methods predict if it differs, budget and notes."""
    result = table(comparison, with_predicted=False)
    predictions = [f"{m.label}: {m.predicts}" for m in comparison.methods if m.predicts]
    predictions = predictions if len({method.predicts for method in comparison.methods}) > 1 else []
    mark = ["* ahead of every other row by more than both deviations"] if result.best else []
    return "\n".join(
        [str(headline(comparison)), result.terminal(), *predictions, *mark, comparison.budget, *comparison.notes]
    )


def markdown(comparison: Comparison, name: str) -> str:
    result = table(comparison)
    parts = [
        f"# {name}",
        escape_markdown(str(headline(comparison))),
        result.markdown(),
        BOLD * bool(result.best),
        comparison.budget,
        bullets(comparison.notes),
    ]
    if comparison.correlations:
        parts += ["## Selection without labels", SELECTION, _selection(comparison.correlations).markdown()]
    return "\n\n".join(filter(None, parts)) + "\n"


def _selection(correlations: Sequence[Correlation]) -> Table:
    """A row for each criterion: its correlations over runs and over evaluations, each with its n."""
    probes = list(dict.fromkeys(correlation.probe for correlation in correlations))
    cells = {(c.criterion, c.probe): c for c in correlations}
    missing = Correlation("", "", (math.nan, 0), (math.nan, 0))
    lines = []
    for criterion in dict.fromkeys(correlation.criterion for correlation in correlations):
        row = [cells.get((criterion, probe), missing) for probe in probes]
        pairs = [*(c.over_runs for c in row), *(c.over_evaluations for c in row)]
        lines.append([criterion, *(f"{rho:+.2f} (n={n})" if math.isfinite(rho) else f"- (n={n})" for rho, n in pairs)])
    heads = [f"{probe}, over {unit}" for unit in ("runs", "evaluations") for probe in probes]
    return Table(heads=["", *heads], rows=lines)


def numbers(comparison: Comparison) -> dict[str, Any]:
    """All values of the table without rounding, for programs."""
    rows = {m.label: comparison.values(m) for m in comparison.methods} | dict(comparison.baselines)
    return {
        "headline": str(headline(comparison)),
        "budget": comparison.budget,
        "notes": list(comparison.notes),
        "values": {
            title: {column.metric: v and v._asdict() for column, v in zip(comparison.columns, row, strict=True)}
            for title, row in rows.items()
        },
        "costs": {m.label: {name: v and v._asdict() for name, v in costs(m).items()} for m in comparison.methods},
        "predicts": {method.label: method.predicts for method in comparison.methods},
        "runs": {m.label: {str(run.folder): run.config["seed"] for run in m.runs} for m in comparison.methods},
        "left_out": dict(comparison.left_out),
        "correlations": [
            c._asdict() | {part: {"rho": rho if math.isfinite(rho) else None, "n": n}
                           for part, (rho, n) in (("over_runs", c.over_runs), ("over_evaluations", c.over_evaluations))}
            for c in comparison.correlations
        ],
    }  # fmt: skip


def html(comparison: Comparison, folder: Path, name: str) -> str:
    result = table(comparison)
    return render(
        "comparison.html", name=name, headline=headline(comparison), budget=comparison.budget, result=result,
        notes=[*[BOLD] * bool(result.best), *comparison.notes],
        sections=[_charts(comparison, axis) for axis in AXES if comparison.probes],
        selection=_selection(comparison.correlations), selection_lead=SELECTION,
        pictures=_pictures(comparison.methods), runs=_runs(comparison, folder),
    )  # fmt: skip


def _charts(comparison: Comparison, axis: str) -> tuple[str, str, list[Markup]]:
    """Title, introduction, and a chart for each probe with a line per method."""
    methods = comparison.methods[:NUM_COLOURS]
    figures = []
    for index, column in enumerate(comparison.columns):
        if column in comparison.probes:
            lines = [line for method in methods if (line := curve(method, column.metric, axis)).points]
            baselines = [
                ReferenceLine(name=title, value=v.mean) for title, row in comparison.baselines if (v := row[index])
            ]
            figures.append(line_chart(Chart(title=column.head, unit="%", axis=axis), lines, baselines))
    has_seeds = any(len(method.runs) > 1 for method in methods)
    lead = "The mean of the seeds, in a band from the lowest to the highest." if has_seeds else ""
    if len(methods) < len(comparison.methods):
        lead += f" The first {len(methods)} of {len(comparison.methods)} methods."
    return AXES[axis], lead, figures


def curve(method: Method, metric: str, axis: str) -> Line:
    """The mean over the seeds at the steps that all of them evaluated, over steps, samples or seconds."""
    by_seed = [values for run in method.runs if (values := dict(series(run.rows, metric)))]
    steps = sorted(set.intersection(*map(set, by_seed))) if by_seed else []
    points, band = [], []
    for step in steps:
        values = [seed_values[step] for seed_values in by_seed]
        samples, seconds = (fmean(x) for x in zip(*(run.at(step) for run in method.runs), strict=True))
        points.append(({"step": step, "sample": samples, "second": seconds}[axis], fmean(values)))
        band.append((min(values), max(values)))
    return Line(name=method.label, points=points, band=band)


def _pictures(methods: Sequence[Method]) -> list[tuple[str, Markup]]:
    """Reconstructions by the first seed of each method at its last evaluation."""
    pictures = []
    for method in methods:
        run = min(method.runs, key=lambda run: run.config["seed"])
        last = max(run.folder.glob(f"{MEDIA}/step_*"), default=None)
        title = f"{method.label}, seed {run.config['seed']}"
        pictures += [(title, picture(path)) for path in (sorted(last.glob("reconstruction*.png")) if last else ())]
    return pictures


def _runs(comparison: Comparison, folder: Path) -> Table:
    rows: list[Sequence[str]] = []
    for method in comparison.methods:
        for run in method.runs:
            address = Path(os.path.relpath(run.folder / "report.html", folder)).as_posix()
            link = Markup('<a href="{}">report</a>').format(address)
            rows.append([method.label, str(run.config["seed"]), duration(run.clock[-1][2]), link])
    return Table(heads=["", "seed", "training time", ""], rows=[*rows, *comparison.left_out])


def send_to_wandb(comparison: Comparison, folder: Path, name: str) -> None:
    """Log the table and the curves as a W&B run of its own, with the logger settings of the first run."""
    from jepa.logger import WandbLogger

    run = comparison.methods[0].runs[0]
    options = (run.config.get("logger") or {}).get("wandb") or Choice("logger", "wandb", WANDB).values
    values = {key.rpartition(".")[2]: value for key, value in options.items()}
    settings: dict[str, Any] = {key: values[key] for key in ("project", "entity", "mode")}
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
    result = table(comparison)
    logger.table(max(rows, default=0), "comparison", ["method", *result.heads[1:]], result.rows)
    logger.close("finished")
