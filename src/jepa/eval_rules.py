"""What must hold between the keys of `jepa-eval`. Without torch."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jepa.catalogue import suggestion
from jepa.checked import Checked, Rule, pair_of
from jepa.sources import find_source

FLOORS = ("pixels", "hog", "untrained")
TASKS = ("knn", "linear", "attentive", "finetune", "inspect")
OF_VECTORS = ("knn", "linear")
"""Tasks that need neither tokens nor weights."""


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def evaluator_of(task: str, solver: str | None) -> str | None:
    """Its name in the configuration; None of a task that is none."""
    if task == "linear" and solver == "sgd":
        return "linear_sgd"
    return task if task in TASKS and task != "inspect" else None


def _tasks(checked: Checked) -> Iterator[str]:
    yield from _each(checked, "task", TASKS)


def _floors(checked: Checked) -> Iterator[str]:
    if checked["floors"]:
        yield from _each(checked, "floors", FLOORS)


def _each(checked: Checked, key: str, valid: tuple[str, ...]) -> Iterator[str]:
    words, known = as_list(checked[key]), f"valid: {', '.join(valid)}"
    if not words:
        yield f"{checked.show(key)}: names nothing; {known}"
    for word in words:
        if word not in valid:
            yield f"{checked.show(key)}: no such {key} {word!r}{suggestion(str(word), valid)}; {known}"


def _runs(checked: Checked) -> Iterator[str]:
    tasks, runs = as_list(checked["task"]), as_list(checked["run"])
    encoders = [run for run in runs if run not in FLOORS]
    if not runs:
        yield f"{checked.show('run')}: names nothing to judge"
    for run in encoders:
        if not isinstance(run, str):
            yield f"{checked.show('run')}: {run!r} is no path; give the path of a run"
        elif fault := _source_fault(run):
            yield f"{checked.show('run')}: {fault}"
    if "untrained" in runs and not encoders:
        yield f"{checked.show('run')}: untrained is the architecture of a run, and no run is beside it"
    needs_encoder = [task for task in tasks if task in TASKS and task not in OF_VECTORS]
    if runs and not encoders and needs_encoder:
        both = f"{checked.show('task')} with {checked.show('run')}"
        yield f"{both}: {needs_encoder[0]} needs an encoder; use knn or linear"
    if runs and not encoders and "image_size" not in checked:
        yield f"{checked.show('run')}: image_size must be given where no encoder says what it sees"
    if "hog" in runs and find_spec("skimage") is None:
        yield f"{checked.show('run')}: hog needs scikit-image: pip install 'jepa-train[eval]'"


def _source_fault(run: str) -> str | None:
    """Why nothing can be read from there; None where it looks well."""
    try:
        find_source(run)
    except ValueError as error:
        path = Path(run).expanduser()
        if ":" in run or path.exists():
            return f"{error}"
        beside = [f"{path.parent / one.name}" for one in path.parent.iterdir()] if path.parent.is_dir() else []
        return f"{error}; or one of {', '.join(FLOORS)}{suggestion(run, [*sorted(beside), *FLOORS])}"
    return None


def _shots(checked: Checked) -> Iterator[str]:
    shots = checked["shots"]
    if not (0 < shots < 1 or (isinstance(shots, int) and shots >= 1)):
        yield f"{checked.show('shots')}: must be a share above 0 and below 1, or a whole number of samples per class"


def _size(checked: Checked) -> Iterator[str]:
    checked["task"]
    if pair_of(checked["image_size"]) is None:
        yield f"{checked.show('image_size')}: takes a number of pixels, or [height, width]"


def _evaluators(checked: Checked) -> Iterator[str]:
    """A task is an evaluator that has to be there."""
    needed = [evaluator_of(task, checked.get("solver")) for task in as_list(checked["task"])]
    missing = [name for name in needed if name and name not in (checked.config.get("evaluator") or ())]
    if missing:
        yield f"{checked.show('task')}: evaluator={missing[0]} is not among those chosen; leave evaluator out"


OF_EVAL: tuple[Rule, ...] = (_tasks, _floors, _runs, _shots, _size, _evaluators)
