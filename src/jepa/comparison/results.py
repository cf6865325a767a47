"""What several runs have measured, side by side: methods, their means and spreads over seeds, and rank correlations.

Works on run folders alone. Runs that differ in nothing but the seed are one method; values are those of the last step.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np
import yaml

from jepa.config.catalogue import Catalogue, conf_folder, flatten
from jepa.config.schema import IRRELEVANT, IRRELEVANT_SECTIONS, show_value
from jepa.errors import RunError
from jepa.reports.verdict import Column, initial_weights, series, table_columns
from jepa.runs.metrics import METRICS, Row, read_config, read_json, read_rows

BUDGET_FILE, MEASUREMENT_FOLDER = "budget.json", ".measure"
FINETUNED = Column("fine-tuned", "probe/finetune_top1")
CRITERIA = {
    "collapse/rank": "rank",
    "collapse/rank_centred": "centred rank",
    "select/lidar": "LiDAR",
    "select/alpha": "alpha",
    "predict/gain": "prediction gain",
    "train/loss": "minus training loss",
}
"""What can choose between runs without labels; of the loss, less is better."""
MIN_PAIRS = 4
"""pairs below which a rank correlation says nothing"""


class Spread(NamedTuple):
    mean: float
    deviation: float | None
    """of the sample, over n - 1; None of one value"""
    n: int


def spread(values: Iterable[float | None]) -> Spread | None:
    """Mean and deviation of the finite values; None where there are none."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return Spread(fmean(known), stdev(known) if len(known) > 1 else None, len(known)) if known else None


@dataclass(frozen=True, kw_only=True)
class RunResult:
    folder: Path
    config: Mapping[str, Any]
    rows: Sequence[Row]
    status: str
    message: str
    method: str = ""
    """its name in the comparison that started it, where it has one"""
    budget_seconds: float | None = None

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What tells methods apart, under dotted names."""
        flat = {"regularizer": ",".join(self.config.get("regularizer") or {}) or "none", **dict(flatten(self.config))}
        own = {key: value for key, value in flat.items() if key not in IRRELEVANT | {"seed"}}
        return {key: value for key, value in own.items() if key.partition(".")[0] not in IRRELEVANT_SECTIONS}

    @cached_property
    def clock(self) -> list[tuple[float, float, float]]:
        """(step, samples seen, seconds of training so far), from the measured rates: pauses and stops count nothing."""
        points = [(0.0, 0.0, 0.0)]
        for row in self.rows:
            rate = row.get("perf/samples_per_s", math.nan)
            if rate > 0 and math.isfinite(rate):
                _, before, seconds = points[-1]
                points.append((row["step"], row["samples"], seconds + (row["samples"] - before) / rate))
        return points

    def at(self, step: float) -> tuple[float, float]:
        """Samples seen and seconds of training after `step` steps."""
        steps, samples, seconds = zip(*self.clock, strict=True)
        return float(np.interp(step, steps, samples)), float(np.interp(step, steps, seconds))

    def last(self, metric: str, until: float = math.inf) -> float | None:
        """The last value after step 0."""
        return next((value for step, value in reversed(series(self.rows, metric)) if 0 < step <= until), None)

    @property
    def memory(self) -> float | None:
        return max((value for _, value in series(self.rows, "perf/peak_memory_gib")), default=None)


@dataclass(frozen=True)
class Method:
    label: str
    predicts: str
    runs: Sequence[RunResult]

    def over_seeds(self, value: Callable[[RunResult], float | None]) -> Spread | None:
        return spread(value(run) for run in self.runs)

    @cached_property
    def seeds(self) -> list[int]:
        return sorted(run.config["seed"] for run in self.runs)


class Correlation(NamedTuple):
    """Spearman's, with the number of pairs: of the last values of all runs, and of all evaluations after step 0."""

    criterion: str
    probe: str
    over_runs: tuple[float, int]
    over_evaluations: tuple[float, int]


@dataclass(frozen=True)
class Comparison:
    columns: Sequence[Column]
    methods: Sequence[Method]
    """the best of the first column first"""
    baselines: Sequence[tuple[str, Sequence[Spread | None]]]
    left_out: Sequence[tuple[str, str]]
    """folders of runs that are not finished, and why"""
    budget: str
    notes: Sequence[str]
    correlations: Sequence[Correlation]

    @property
    def probes(self) -> list[Column]:
        return [column for column in self.columns if column.metric.startswith("probe/")]

    def values(self, method: Method) -> list[Spread | None]:
        return [method.over_seeds(lambda run, name=column.metric: run.last(name)) for column in self.columns]

    def leaders(self) -> list[int | None]:
        """Of each probe the row (methods, then baselines) that is ahead of all others by more than both deviations."""
        rows = [*map(self.values, self.methods), *(values for _, values in self.baselines)]
        return [_leader([row[place] for row in rows]) if c in self.probes else None
                for place, c in enumerate(self.columns)]  # fmt: skip


def _leader(values: Sequence[Spread | None]) -> int | None:
    reach = [(v.mean, math.inf if v.deviation is None else v.deviation, place) for place, v in enumerate(values) if v]
    if len(reach) < 2:
        return None
    (best, own, place), *rivals = sorted(reach, reverse=True)
    return place if all(best - mean > own + deviation for mean, deviation, _ in rivals) else None


def find_runs(folders: Sequence[Path]) -> list[RunResult]:
    """The runs at any depth. Raises RunError where there is no such folder, or no run in it."""
    found: dict[Path, RunResult] = {}
    for folder in folders:
        if not folder.is_dir():
            raise RunError(
                f"{folder}: there is no such folder; give folders of runs, or overrides as objective=jepa,mae"
            )
        found_here = [path.parent for path in sorted(folder.rglob(METRICS)) if path.parent.name != MEASUREMENT_FOLDER]
        places = [place for place in found_here if (place / "config.yaml").is_file()]
        if not places:
            raise RunError(f"{folder}: holds no run, at no depth; a run is a folder with {METRICS} and config.yaml")
        found |= {place.resolve(): _read(place) for place in places}
    return list(found.values())


def _read(folder: Path) -> RunResult:
    try:
        rows, ended, config = read_rows(folder), read_json(folder / "run.json"), read_config(folder)
    except (ValueError, yaml.YAMLError) as error:
        raise RunError(f"{folder} cannot be read: {error}") from error
    budget = next((b for parent in folder.parents if (b := _budget(parent, folder))), {})
    return RunResult(
        folder=folder,
        config={"seed": 0, **config},
        rows=rows,
        status=ended.get("status", "running"),
        message=ended.get("message", ""),
        method=budget.get("members", {}).get(budget.get("own"), ""),
        budget_seconds=budget.get("seconds"),
    )


def _budget(parent: Path, folder: Path) -> dict[str, Any]:
    """What the comparison says that started the run, if one in `parent` did."""
    own = folder.relative_to(parent).as_posix()
    budget = read_json(parent / BUDGET_FILE)
    return {**budget, "own": own} if own in budget.get("members", {}) else {}


def compare(runs: Sequence[RunResult], left_out: Sequence[tuple[str, str]] = ()) -> Comparison:
    """Raises RunError where no run is finished; `left_out` are runs of which there is not even a folder."""
    done = [run for run in runs if run.status == "finished"]
    left = [(str(r.folder), f"{r.status}{': ' * bool(r.message)}{r.message}") for r in runs if r.status != "finished"]
    left = [*left, *left_out]
    if not done:
        told = "; ".join(f"{folder} ({why})" for folder, why in left)
        raise RunError(f"none of the runs is finished, so there is nothing to compare: {told}")
    rows = [row for run in done for row in run.rows]
    columns = _columns(rows)
    methods = _methods(done)
    first = columns[0].metric
    methods.sort(key=lambda m: -(found.mean if (found := m.over_seeds(lambda run: run.last(first))) else -math.inf))
    budget, notes = _describe_budget(methods), _notes(methods, left)
    probes = [column for column in columns if column.metric.startswith("probe/")]
    return Comparison(columns, methods, _baselines(done, columns), left, budget, notes, _correlations(done, probes))


def _columns(rows: Sequence[Row]) -> list[Column]:
    columns = table_columns(rows)
    is_measured = any(FINETUNED.metric in row for row in rows)
    if is_measured and FINETUNED.metric not in {column.metric for column in columns}:
        columns.insert(-1, FINETUNED)
    return columns


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
    predicts = [comments.get(group[0].settings.get("objective._target_", ""), "") for group in members]
    return [Method(*method) for method in zip(names, predicts, members, strict=True)]


def labels(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of each group the settings in which it differs from the others: what is chosen first, then values.

    Values are told apart among groups that chose the same: what one objective needs says nothing about another.
    """
    names = []
    keys = list(dict.fromkeys(key for group in groups for key in group))
    chosen = sorted((key for key in keys if _is_choice(key)), key=lambda key: key != "objective._target_")
    for group in groups:
        parts, rivals = [], list(groups)
        for key in [*chosen, *(key for key in keys if key not in chosen)]:
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
    """Encoder of step 0 and raw pixels, of each seed the mean over the methods."""
    rows = []
    starts = " or ".join(sorted({initial_weights(run.config) for run in runs}, reverse=True))
    for title, prefix in ((f"{starts} encoder", ""), ("raw pixels", "baseline/pixels_")):
        names = [prefix + column.metric.partition("/")[2] if prefix else column.metric for column in columns]
        rows.append((title, [_at_start(runs, name) for name in names]))
    return rows


def _at_start(runs: Sequence[RunResult], name: str) -> Spread | None:
    by_seed: dict[int, list[float]] = {}
    for run in runs:
        by_seed.setdefault(run.config["seed"], []).extend(v for step, v in series(run.rows, name) if step == 0)
    return spread(fmean(values) for values in by_seed.values() if values)


def _describe_budget(methods: Sequence[Method]) -> str:
    """Which budget was equal, in words that hold for these runs."""
    runs = [run for method in methods for run in method.runs]
    seconds = [run.clock[-1][2] for run in runs]
    wanted = {run.budget_seconds for run in runs}
    if None not in wanted and len(wanted) == 1:
        return (
            f"Equal budget: {wanted.pop():g} seconds of training for each run, at the rate of its method measured "
            f"beforehand; the runs took {min(seconds):.0f} to {max(seconds):.0f} s."
        )
    samples = {round(run.clock[-1][1]) for run in runs}
    if len(samples) == 1:
        return f"Equal budget: each run has seen {samples.pop():,} samples."
    told = (f"{method.label} {max(run.clock[-1][1] for run in method.runs):,.0f}" for method in methods)
    return f"NOT an equal budget: the runs differ in the samples they have seen ({'; '.join(told)})."


def _notes(methods: Sequence[Method], left: Sequence[tuple[str, str]]) -> list[str]:
    runs = [run for method in methods for run in method.runs]
    notes = ["Values are those of the last step, never of the best; ± is the sample standard deviation over seeds."]
    if any(len(method.runs) == 1 for method in methods):
        notes.append("A method with one seed has no spread: small differences from it mean nothing.")
    for method in methods:
        if len(set(method.seeds)) < len(method.seeds):
            notes.append(f"{method.label}: more than one run has the same seed, so the spread is too small.")
    flat = [method.runs[0].settings for method in methods]
    differing = {
        key for settings in flat for key in settings if any(key not in s or s[key] != settings[key] for s in flat)
    }
    if same := [
        s for s in ("encoder", "dataset", "augment", "image_size") if any(k.split(".")[0] == s for k in differing)
    ]:
        notes.append(f"The methods differ in {', '.join(same)} too.")
    if len({json.dumps(run.config.get("evaluation"), default=str) for run in runs}) > 1:
        notes.append("The runs were evaluated on different numbers of samples (evaluation.*).")
    if left:
        notes.append(f"Left out, since not finished: {'; '.join(f'{folder} ({why})' for folder, why in left)}.")
    return notes


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """The correlation of the ranks, ties at their mean rank; nan where one side is constant."""
    ranks = []
    for values in (first, second):
        _, inverse, counts = np.unique(np.asarray(values, dtype=float), return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[inverse])
    if min(rank.std() for rank in ranks) == 0:
        return math.nan
    return float(np.corrcoef(*ranks)[0, 1])


def _correlations(runs: Sequence[RunResult], probes: Sequence[Column]) -> list[Correlation]:
    found = []
    for criterion, probe in ((c, p) for c in CRITERIA for p in probes):
        sign = -1 if criterion == "train/loss" else 1
        at_end = [(run.last(criterion), run.last(probe.metric)) for run in runs]
        always = [(r.last(criterion, s), v) for r in runs for s, v in series(r.rows, probe.metric) if s > 0]
        pairs = [[(sign * c, p) for c, p in part if c is not None and p is not None] for part in (at_end, always)]
        if pairs[1]:
            over_runs, over_evaluations = ((_rank_correlation(part), len(part)) for part in pairs)
            found.append(Correlation(CRITERIA[criterion], probe.head, over_runs, over_evaluations))
    return found


def _rank_correlation(pairs: Sequence[tuple[float, float]]) -> float:
    return math.nan if len(pairs) < MIN_PAIRS else spearman(*zip(*pairs, strict=True))
