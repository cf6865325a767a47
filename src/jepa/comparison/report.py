"""A comparison as a table for the terminal, as Markdown, as a self-contained HTML page and as numbers."""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from jepa.comparison.results import Comparison, Correlation, Method, RunResult, Spread, spread
from jepa.config.catalogue import Choice, conf_folder
from jepa.reports.charts import NUM_COLOURS, Baseline, Chart, Line, line_chart, number
from jepa.reports.page import Table, bullets, data_url, image, render
from jepa.reports.verdict import Column, series
from jepa.runs.metrics import MEDIA, write_atomically
from jepa.training.progress import duration

COSTS = ("steps", "samples", "time", "samples/s", "memory", "seeds")
WANDB = conf_folder() / "logger" / "wandb.yaml"
AXES = {"step": "Over steps", "sample": "Over samples seen", "second": "Over training time"}
BOLD = "Bold: ahead of every other row by more than both deviations."
SELECTION = (
    "Spearman's rank correlation between what is known without labels and each probe: 1 would choose the same run as "
    "the labels, 0 is chance. Evaluations of one run hang together, so their number is no sample size; over methods "
    "that predict different things, loss and prediction gain are not on one scale."
)


def write(comparison: Comparison, folder: Path, name: str) -> str:
    """compare.md, compare.html and compare.json in the folder; returns the table for a terminal."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "compare.md", markdown(comparison, name))
    write_atomically(folder / "compare.html", html(comparison, folder, name))
    write_atomically(folder / "compare.json", json.dumps(numbers(comparison), indent=1) + "\n")
    return terminal(comparison)


def table(comparison: Comparison, *, with_predicted: bool = True) -> Table:
    """A row for each method, then for the baselines; what a method predicts stands beside its name."""
    titles = [[method.label, method.predicts] for method in comparison.methods]
    titles += [[title, "nothing"] for title, _ in comparison.baselines]
    values = [*map(comparison.values, comparison.methods), *(values for _, values in comparison.baselines)]
    costs = [*map(_costs, comparison.methods), *[["-"] * len(COSTS) for _ in comparison.baselines]]
    first = 2 if with_predicted else 1
    return Table(
        heads=[*["", "predicts"][:first], *(column.head for column in comparison.columns), *COSTS],
        rows=[
            [*title[:first], *map(_cell, row, comparison.columns), *cost]
            for title, row, cost in zip(titles, values, costs, strict=True)
        ],
        text_columns={1} if with_predicted else (),
        best={(leader, first + c) for c, leader in enumerate(comparison.leaders()) if leader is not None},
    )


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
    """The table; below it stand what the methods predict, the budget and the notes."""
    result = table(comparison, with_predicted=False)
    predictions = [f"{m.label}: {m.predicts}" for m in comparison.methods if m.predicts]
    mark = ["* ahead of every other row by more than both deviations"] if result.best else []
    return "\n".join([result.terminal(), *predictions, *mark, comparison.budget, *comparison.notes])


def markdown(comparison: Comparison, name: str) -> str:
    parts = [f"# {name}", table(comparison).markdown(), BOLD, comparison.budget, bullets(comparison.notes)]
    if comparison.correlations:
        parts += ["## Selection without labels", SELECTION, _selection(comparison.correlations).markdown()]
    return "\n\n".join(filter(None, parts)) + "\n"


def _selection(correlations: Sequence[Correlation]) -> Table:
    """A row for each criterion: over runs and over evaluations, each with its n."""
    probes = list(dict.fromkeys(correlation.probe for correlation in correlations))
    found = {(c.criterion, c.probe): (c.over_runs, c.over_evaluations) for c in correlations}
    heads = [f"{probe}, over {what}" for what in ("runs", "evaluations") for probe in probes]
    lines = []
    for criterion in dict.fromkeys(correlation.criterion for correlation in correlations):
        pairs = [found[criterion, probe][part] if (criterion, probe) in found else (math.nan, 0)
                 for part in (0, 1) for probe in probes]  # fmt: skip
        lines.append([criterion, *(f"{rho:+.2f} (n={n})" if math.isfinite(rho) else f"- (n={n})" for rho, n in pairs)])
    return Table(heads=["", *heads], rows=lines)


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
    return render(
        "comparison.html", name=name, budget=comparison.budget, result=table(comparison),
        notes=[BOLD, *comparison.notes], sections=[_charts(comparison, axis) for axis in AXES if comparison.probes],
        selection=_selection(comparison.correlations), selection_lead=SELECTION,
        pictures=_pictures(comparison.methods), runs=_runs(comparison, folder),
    )  # fmt: skip


def _charts(comparison: Comparison, axis: str) -> tuple[str, str, list[Markup]]:
    """Title, lead, and a chart for each probe: a line per method, the mean over its seeds in a band of them."""
    drawn = comparison.methods[:NUM_COLOURS]
    figures = []
    for column in comparison.probes:
        lines = [line for method in drawn if (line := curve(method, column.metric, axis)).points]
        place = comparison.columns.index(column)
        levels = [Baseline(name=title, value=v.mean) for title, values in comparison.baselines if (v := values[place])]
        figures.append(line_chart(Chart(title=column.head, unit="%", axis=axis), lines, levels))
    lead = "The mean of the seeds, in a band from the lowest to the highest."
    if len(drawn) < len(comparison.methods):
        lead += f" The first {len(drawn)} of {len(comparison.methods)} methods."
    return AXES[axis], lead, figures


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


def _pictures(methods: Sequence[Method]) -> list[tuple[str, Markup]]:
    """What each method predicts, as its first seed drew it at its last evaluation."""
    pictures = []
    for method in methods:
        run = min(method.runs, key=lambda run: run.config["seed"])
        last = max(run.folder.glob(f"{MEDIA}/step_*"), default=None)
        title = f"{method.label}, seed {run.config['seed']}"
        paths = sorted(last.glob("reconstruction*.png")) if last else ()
        pictures += [(title, image(data_url(path.read_bytes()), path.stem)) for path in paths]
    return pictures


def _runs(comparison: Comparison, folder: Path) -> Table:
    runs = [_run_row(method, run, folder) for method in comparison.methods for run in method.runs]
    return Table(heads=["", "seed", "training time", ""], rows=[*runs, *comparison.left_out])


def _run_row(method: Method, run: RunResult, folder: Path) -> list[str]:
    address = Path(os.path.relpath(run.folder / "report.html", folder)).as_posix()
    link = Markup('<a href="{}">report</a>').format(address)
    return [method.label, str(run.config["seed"]), duration(run.clock[-1][2]), link]


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
    result = table(comparison)
    logger.table(max(rows, default=0), "comparison", ["method", *result.heads[1:]], result.rows)
    logger.close("finished")
