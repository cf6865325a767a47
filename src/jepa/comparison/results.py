"""Results of several runs: methods, their means and deviations over seeds, and rank correlations.

Reads run folders alone. Runs that differ only in the seed are one method; values are those of the last step.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np

from jepa.config.catalogue import Catalogue, conf_folder, flatten
from jepa.config.files import Fields
from jepa.config.schema import IRRELEVANT, IRRELEVANT_SECTIONS, show_value
from jepa.errors import FileError, RunError
from jepa.reports.run_table import Column, table_columns
from jepa.reports.statistics import spearman
from jepa.reports.verdict import NUM_EVALUATED, initial_weights, margin, series
from jepa.runs.metrics import METRICS, Row, clock, read_config, read_ending, read_json, read_rows

BUDGET_FILE, MEASUREMENT_FOLDER = "budget.json", ".measure"
BUDGET_FIELDS: Fields = {
    "seconds": float | None, "members": Mapping[str, str] | None, "steps": Mapping[str, float] | None,
    "samples_per_s": Mapping[str, float] | None,
}  # fmt: skip
"""Fields of budget.json."""
CRITERIA = {
    "collapse/rank": "rank", "collapse/rank_centred": "centred rank", "select/lidar": "LiDAR", "select/alpha": "alpha",
    "predict/gain": "prediction gain", "train/loss": "minus training loss",
}  # fmt: skip
"""Criteria that select between runs without labels, with their names; for the loss, less is better."""
MIN_PAIRS = 4
"""Number of pairs below which there is no rank correlation."""
MIN_SEEDS = 3
"""Number of values below which there is no spread, and no method is called ahead of another."""


class Spread(NamedTuple):
    mean: float
    deviation: float | None
    """sample standard deviation (n - 1); None for fewer than MIN_SEEDS values"""
    n: int


def spread(values: Iterable[float | None]) -> Spread | None:
    """Mean and deviation of the finite values; None if there are none."""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    return Spread(fmean(finite), stdev(finite) if len(finite) >= MIN_SEEDS else None, len(finite)) if finite else None


@dataclass(frozen=True, kw_only=True)
class RunResult:
    folder: Path
    config: Mapping[str, Any]
    rows: Sequence[Row]
    status: str
    message: str
    method: str = ""
    """name of the method in the comparison that started the run"""
    budget_seconds: float | None = None

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The settings that distinguish methods, under dotted names."""
        regularizers = {"regularizer": ",".join(self.config.get("regularizer") or {}) or "none"}
        flat = regularizers | dict(flatten(self.config)) | regularizers  # first, and not the empty section
        keys = {key for key in flat if key.partition(".")[0] not in IRRELEVANT_SECTIONS} - IRRELEVANT - {"seed"}
        return {key: value for key, value in flat.items() if key in keys}

    @cached_property
    def clock(self) -> list[tuple[float, float, float]]:
        return clock(self.rows)

    def at(self, step: float) -> tuple[float, float]:
        """Samples seen and seconds of training after `step` steps."""
        steps, samples, seconds = zip(*self.clock, strict=True)
        return float(np.interp(step, steps, samples)), float(np.interp(step, steps, seconds))

    def last(self, metric: str, until: float = math.inf) -> float | None:
        """The last value after step 0, up to step `until`."""
        return next((value for step, value in reversed(series(self.rows, metric)) if 0 < step <= until), None)


@dataclass(frozen=True)
class Method:
    label: str
    predicts: str
    """what its objective predicts, in words"""
    runs: Sequence[RunResult]

    def last(self, metric: str) -> Spread | None:
        """The last values of the runs."""
        return spread(run.last(metric) for run in self.runs)


class Correlation(NamedTuple):
    """Rank correlation and number of pairs, over the last values of all runs and over all evaluations after step 0."""

    criterion: str
    probe: str
    over_runs: tuple[float, int]
    over_evaluations: tuple[float, int]


@dataclass(frozen=True)
class Comparison:
    columns: Sequence[Column]
    methods: Sequence[Method]
    """sorted by the first probe, best first"""
    baselines: Sequence[tuple[str, Sequence[Spread | None]]]
    left_out: Sequence[tuple[str, str]]
    """folders of unfinished runs with the reasons"""
    budget: str
    notes: Sequence[str]
    correlations: Sequence[Correlation]

    @property
    def probes(self) -> list[Column]:
        return probes_of(self.columns)

    def values(self, method: Method) -> list[Spread | None]:
        return [method.last(column.metric) for column in self.columns]

    def leaders(self) -> list[int | None]:
        """For each probe the row (methods, then baselines) that exceeds all others by more than both deviations."""
        rows = [*map(self.values, self.methods), *(values for _, values in self.baselines)]
        columns = zip(self.columns, zip(*rows, strict=True), strict=True)
        return [leader(values, self.margin_of(c)) if c in self.probes else None for c, values in columns]

    def margin_of(self, column: Column) -> float:
        """Half the interval in points of a difference between methods, for the evaluated samples; 0 if not known."""
        counts = [run.last(NUM_EVALUATED) for method in self.methods for run in method.runs]
        last = max((value.mean for m in self.methods if (value := m.last(column.metric))), default=0.0)
        return 0.0 if None in counts else margin(column.metric, last, last, int(min(filter(None, counts), default=1)))


def probes_of(columns: Sequence[Column]) -> list[Column]:
    return [column for column in columns if column.metric.startswith(("probe/", "detect/"))]


def leader(values: Sequence[Spread | None], least: float = 0.0) -> int | None:
    """The one that exceeds all others by more than both deviations and `least`; None if one has no deviation."""
    ranking = [(v.mean, math.inf if v.deviation is None else v.deviation, row) for row, v in enumerate(values) if v]
    if len(ranking) < 2:
        return None
    (best, deviation, leader), *rivals = sorted(ranking, reverse=True)
    return leader if all(best - mean > max(least, deviation + other) for mean, other, _ in rivals) else None


def find_runs(folders: Sequence[Path]) -> list[RunResult]:
    """The runs at any depth. Raises RunError if a folder does not exist or holds no run."""
    runs: dict[Path, RunResult] = {}
    for folder in folders:
        if not os.path.isdir(folder):
            hint = "give folders of runs, or overrides as objective=jepa,mae"
            raise RunError(f"{folder}: there is no such folder; {hint}")
        paths = [path.parent for path in sorted(folder.rglob(METRICS)) if path.parent.name != MEASUREMENT_FOLDER]
        paths = [path for path in paths if (path / "config.yaml").is_file()]
        if not paths:
            raise RunError(f"{folder}: holds no run, at no depth; a run is a folder with {METRICS} and config.yaml")
        runs |= {path.resolve(): _read(path) for path in paths}
    return list(runs.values())


def _read(folder: Path) -> RunResult:
    try:
        rows, ended, config = read_rows(folder), read_ending(folder), read_config(folder)
    except FileError as error:
        raise RunError(f"{folder} cannot be read: {error}") from error
    budget, method = _budget(folder)
    return RunResult(
        folder=folder, config=config | {"seed": config.get("seed") or 0}, rows=rows,
        status=ended.get("status", "running"), message=ended.get("message", ""), method=method,
        budget_seconds=budget.get("seconds"),
    )  # fmt: skip


def read_budget(folder: Path) -> dict[str, Any]:
    """budget.json of a comparison, which `jepa.comparison.runs` writes; empty if there is none."""
    return read_json(folder / BUDGET_FILE, BUDGET_FIELDS)


def _budget(folder: Path) -> tuple[dict[str, Any], str]:
    """Budget and name of the method, from the comparison that started the run; both are empty without one."""
    for parent in folder.parents:
        budget = read_budget(parent)
        label = folder.relative_to(parent).as_posix()
        if label in budget.get("members", {}):
            return budget, budget["members"][label]
    return {}, ""


def compare(runs: Sequence[RunResult], left_out: Sequence[tuple[str, str]] = ()) -> Comparison:
    """Compare the finished runs; `left_out` are runs without a folder. Raises RunError if none is finished."""
    finished = [run for run in runs if run.status == "finished"]
    reasons = {str(r.folder): f"{r.status}{': ' * bool(r.message)}{r.message}" for r in runs if r.status != "finished"}
    left_out = [*reasons.items(), *left_out]
    if not finished:
        raise RunError(f"none of the runs is finished, so there is nothing to compare: {_with_reasons(left_out)}")
    columns = table_columns([row for run in finished for row in run.rows])
    methods = _methods(finished)
    ranked_by = (probes_of(columns) or columns)[0].metric
    methods.sort(key=lambda method: -(value.mean if (value := method.last(ranked_by)) else -math.inf))
    return Comparison(
        columns=columns, methods=methods, baselines=_baselines(finished, columns), left_out=left_out,
        budget=_describe_budget(methods), notes=_notes(methods, left_out),
        correlations=_correlations(finished, probes_of(columns)) if len(finished) >= MIN_PAIRS else [],
    )  # fmt: skip


def _with_reasons(left_out: Sequence[tuple[str, str]]) -> str:
    return "; ".join(f"{folder} ({reason})" for folder, reason in left_out)


def what_it_predicts(settings: Mapping[str, Any], comments: Mapping[str, str]) -> str:
    """What a method predicts, in words."""
    objective = str(settings.get("objective._target_", ""))
    if objective.endswith(".JEPA") and str(settings.get("mask._target_", "")).endswith(".NoMask"):
        return "makes crops of an image alike, and hides no tokens"
    return comments.get(objective, "")


def _methods(runs: Sequence[RunResult]) -> list[Method]:
    groups: dict[str, list[RunResult]] = {}
    for run in runs:
        groups.setdefault(json.dumps(run.settings, sort_keys=True, default=str), []).append(run)
    members = list(groups.values())
    names = [group[0].method for group in members]
    if not all(names) or len(set(names)) < len(names):
        names = labels([group[0].settings for group in members])
    choices = Catalogue([conf_folder()]).groups["objective"].values()
    comments = {choice.values["objective._target_"]: choice.comment.rpartition(": ")[2] for choice in choices}
    predicts = [what_it_predicts(group[0].settings, comments) for group in members]
    return [Method(*method) for method in zip(names, predicts, members, strict=True)]


def labels(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """For each group the settings in which it differs from the others: choices of components first, then values.

    Values are compared only among groups with the same choices, since other components have other settings.
    """
    names = []
    keys = list(dict.fromkeys(key for group in groups for key in group))
    keys.sort(key=lambda key: (not _is_choice(key), key != "objective._target_" and _is_choice(key)))
    for group in groups:
        parts, rivals = [], list(groups)
        for key in keys:
            if any(rival.get(key) != group.get(key) for rival in rivals):
                parts.append(_part(key, group.get(key, "absent")))
                rivals = [rival for rival in rivals if not _is_choice(key) or rival.get(key) == group.get(key)]
        names.append(", ".join(parts) or _part("objective._target_", group.get("objective._target_", "run")))
    return names


def _is_choice(key: str) -> bool:
    return key == "regularizer" or (key.endswith("._target_") and key.count(".") == 1)


def _part(key: str, value: Any) -> str:
    """objective._target_, jepa.objectives.mae.MAE -> mae; mask._target_ -> mask=block; lr -> lr=0.001"""
    group, _, leaf = key.rpartition(".")
    if leaf != "_target_":
        return f"{key}={show_value(value)}"
    name = str(value).split(".")[-2:][0]
    return name if group == "objective" else f"{group}={name}"


def _baselines(runs: Sequence[RunResult], columns: Sequence[Column]) -> list[tuple[str, list[Spread | None]]]:
    """Title and values of the encoder of step 0 and of raw pixels; for each seed the mean over the methods."""
    initial = " or ".join(sorted({initial_weights(run.config) for run in runs}, reverse=True))
    metrics = [column.metric for column in columns]
    pixels = [f"baseline/pixels_{metric.partition('/')[2]}" for metric in metrics]
    titles = {f"{initial} encoder": metrics, "raw pixels": pixels}
    return [(title, [_at_start(runs, name) for name in names]) for title, names in titles.items()]


def _at_start(runs: Sequence[RunResult], name: str) -> Spread | None:
    by_seed: dict[int, list[float]] = {}
    for run in runs:
        by_seed.setdefault(run.config["seed"], []).extend(v for step, v in series(run.rows, name) if step == 0)
    return spread(fmean(values) for values in by_seed.values() if values)


def _describe_budget(methods: Sequence[Method]) -> str:
    """A sentence on the budget that the runs had in common."""
    runs = [run for method in methods for run in method.runs]
    seconds = [run.clock[-1][2] for run in runs]
    budgets = {run.budget_seconds for run in runs}
    if None not in budgets and len(budgets) == 1:
        return (
            f"Equal budget: {budgets.pop():g} seconds of training for each run, at the rate of its method measured "
            f"beforehand; the runs took {min(seconds):.0f} to {max(seconds):.0f} s."
        )
    samples = {round(run.clock[-1][1]) for run in runs}
    if len(samples) == 1:
        return f"Equal budget: each run has seen {samples.pop():,} samples."
    counts = (f"{method.label} {max(run.clock[-1][1] for run in method.runs):,.0f}" for method in methods)
    return f"NOT an equal budget: the runs differ in the samples they have seen ({'; '.join(counts)})."


def _notes(methods: Sequence[Method], left_out: Sequence[tuple[str, str]]) -> list[str]:
    notes = ["Values are those of the last step, never of the best; ± is the sample standard deviation over seeds."]
    if any(len(method.runs) < MIN_SEEDS for method in methods):
        notes.append(f"A method with fewer than {MIN_SEEDS} seeds has no ±: small differences from it mean nothing.")
    for method in methods:
        if len({run.config["seed"] for run in method.runs}) < len(method.runs):
            notes.append(f"{method.label}: more than one run has the same seed, so the spread is too small.")
    settings = [method.runs[0].settings for method in methods]
    differing = {
        key.split(".")[0] for one, other in product(settings, repeat=2) for key in one
        if key not in other or other[key] != one[key]
    }  # fmt: skip
    if sections := [name for name in ("encoder", "dataset", "augment", "image_size") if name in differing]:
        notes.append(f"The methods differ in {', '.join(sections)} too.")
    if len({json.dumps(r.config.get("evaluation"), default=str) for method in methods for r in method.runs}) > 1:
        notes.append("The runs were evaluated on different numbers of samples (evaluation.*).")
    if left_out:
        notes.append(f"Left out, since not finished: {_with_reasons(left_out)}.")
    return notes


def _correlations(runs: Sequence[RunResult], probes: Sequence[Column]) -> list[Correlation]:
    """Correlations of each criterion with each probe that was measured at the same evaluations."""
    correlations = []
    for (criterion, title), probe in product(CRITERIA.items(), probes):
        sign = -1 if criterion == "train/loss" else 1
        at_end = [(run.last(criterion), run.last(probe.metric)) for run in runs]
        all_steps = [(r.last(criterion, s), v) for r in runs for s, v in series(r.rows, probe.metric) if s > 0]
        over_runs, over_evaluations = (
            [(sign * c, p) for c, p in pairs if c is not None and p is not None] for pairs in (at_end, all_steps)
        )
        if over_evaluations:
            coefficients = ((_rank_correlation(pairs), len(pairs)) for pairs in (over_runs, over_evaluations))
            correlations.append(Correlation(title, probe.head, *coefficients))
    return correlations


def _rank_correlation(pairs: Sequence[tuple[float, float]]) -> float:
    return math.nan if len(pairs) < MIN_PAIRS else spearman(*zip(*pairs, strict=True))
