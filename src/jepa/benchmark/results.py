"""The results of jepa-eval: a row for each representation and task, with its interval, stored in eval.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor

from jepa.config import signatures
from jepa.config.files import as_mapping
from jepa.errors import FileError, RunError
from jepa.evaluation.probe import balanced, confusion_counts, is_imbalanced, top1
from jepa.reports.statistics import wilson
from jepa.runs.metrics import read_json, write_atomically

RESULTS_FILE = "eval.json"
FORMAT = "jepa-eval 2"
MAX_STORED_CLASSES = 100
"""Number of classes up to which confusion matrices are stored."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """The result of one seed."""

    seed: int
    top1: float
    """percent"""
    balanced: float | None
    """mean recall of the classes in percent; None if the classes are even"""
    chosen: dict[str, float]
    """hyper-parameters chosen on training samples"""
    confusion: list[list[int]]


@dataclass(frozen=True, kw_only=True)
class Row:
    """The result of a representation on a task; accuracies in percent, means over the trials."""

    title: str
    """name of the representation"""
    column: str
    """name of the task, with the settings that differ from the default protocol"""
    key: str
    """hash of everything that determines the numbers"""
    top1: float
    low: float
    high: float
    deviation: float | None
    """standard deviation of top-1 over the trials; None for a single trial"""
    balanced: float | None
    num_test: int
    per_class: list[float | None]
    """recalls; None for a class without test samples"""
    confusion: list[list[int]] | None
    """label by prediction, summed over the trials; None for more than MAX_STORED_CLASSES classes"""
    trials: list[dict[str, Any]]
    settings: dict[str, Any]
    """the values hashed in `key`"""
    protocol: list[str]
    seconds: dict[str, float]
    run: str = ""


def trial(
    predicted: Tensor, labels: Tensor, train_labels: Tensor, num_classes: int, seed: int, chosen: Mapping
) -> Trial:
    """The trial with predictions [n] for test samples with labels [n]."""
    uneven = is_imbalanced(torch.cat([train_labels, labels]))
    return Trial(
        seed=seed, top1=top1(predicted, labels), balanced=balanced(predicted, labels) if uneven else None,
        chosen=dict(chosen), confusion=confusion_counts(predicted, labels, num_classes).tolist(),
    )  # fmt: skip


def summary(trials: Sequence[Trial], num_test: int) -> dict[str, Any]:
    """The fields of a row that follow from its trials; `num_test` is the number of independent test samples."""
    mean = fmean(trial.top1 for trial in trials)
    low, high = (100 * end for end in wilson(mean / 100, num_test))
    counts = torch.tensor([trial.confusion for trial in trials]).sum(0)
    recalls = [100 * int(row[k]) / int(row.sum()) if row.sum() else None for k, row in enumerate(counts)]
    balanced_accuracies = [trial.balanced for trial in trials if trial.balanced is not None]
    return {
        "top1": mean, "low": low, "high": high, "num_test": num_test, "per_class": recalls,
        "deviation": stdev(trial.top1 for trial in trials) if len(trials) > 1 else None,
        "balanced": fmean(balanced_accuracies) if balanced_accuracies else None,
        "confusion": counts.tolist() if len(counts) <= MAX_STORED_CLASSES else None,
        "trials": [{k: v for k, v in asdict(trial).items() if k != "confusion"} for trial in trials],
    }  # fmt: skip


@dataclass
class Results:
    """The rows stored in a folder, one for each title and column; a new row replaces the old one."""

    folder: Path
    facts: dict[str, Any]
    """data and program; `test` is the digest of the test samples, which all rows share"""
    rows: dict[tuple[str, str], Row] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, facts: dict[str, Any]) -> Results:
        """Read the stored rows. Raises RunError if they are of another version or on other test samples."""
        path = folder / RESULTS_FILE
        stored = read_json(path)
        if stored and stored.get("format") != FORMAT:
            raise RunError(
                f"{folder}/{RESULTS_FILE} is of another version of jepa-eval; give another name=, or remove it"
            )
        if not stored:
            return cls(folder, facts)
        as_mapping(stored, path, {"facts": "dict", "rows": "list[dict]"})
        before = stored["facts"]
        if before.get("test") != facts["test"] or before.get("test_files") not in (None, facts.get("test_files")):
            raise RunError(f"{folder} holds results on other test samples; give another name=, or remove it")
        rows = [
            _row(row, f"{path}: rows[{number}]", len(facts["classes"])) for number, row in enumerate(stored["rows"])
        ]
        return cls(folder, facts, {(row.title, row.column): row for row in rows})

    def add(self, row: Row) -> None:
        self.rows[row.title, row.column] = row
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {"format": FORMAT, "facts": self.facts, "rows": [asdict(row) for row in self.rows.values()]}
        write_atomically(self.folder / RESULTS_FILE, json.dumps(content, indent=1, default=str) + "\n")


def _row(stored: dict[str, Any], where: str, num_classes: int) -> Row:
    """Raises FileError for what is none."""
    as_mapping(stored, where, {part.name: signatures.annotated_type(str(part.type)) for part in fields(Row)})
    if unknown := stored.keys() - {part.name for part in fields(Row)}:
        raise FileError(f"{where}: there is no field {min(unknown)}")
    matrix = stored["confusion"] or [[0] * num_classes] * num_classes
    if {num_classes} != {len(stored["per_class"]), len(matrix), *map(len, matrix)}:
        raise FileError(f"{where}: has figures of other classes than the {num_classes} of the data")
    for number, trial in enumerate(stored["trials"]):
        trial_fields = {
            part.name: signatures.annotated_type(str(part.type)) for part in fields(Trial) if part.name != "confusion"
        }
        as_mapping(trial, f"{where}.trials[{number}]", trial_fields)
    return Row(**stored)
