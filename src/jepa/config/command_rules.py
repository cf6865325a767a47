"""What must hold between the keys of `jepa-eval`. Without torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jepa.config.paths import find_source
from jepa.config.view import ConfigView, Rule, pair_of
from jepa.suggestions import suggestion

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


def _tasks(checked: ConfigView) -> Iterator[str]:
    yield from _each(checked, "task", TASKS)


def _floors(checked: ConfigView) -> Iterator[str]:
    if checked["floors"]:
        yield from _each(checked, "floors", FLOORS)


def _each(checked: ConfigView, key: str, valid: tuple[str, ...]) -> Iterator[str]:
    words, known = as_list(checked[key]), f"valid: {', '.join(valid)}"
    if not words:
        yield f"{checked.show(key)}: names nothing; {known}"
    for word in words:
        if word not in valid:
            yield f"{checked.show(key)}: no such {key} {word!r}{suggestion(str(word), valid)}; {known}"


def _runs(checked: ConfigView) -> Iterator[str]:
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


def _shots(checked: ConfigView) -> Iterator[str]:
    shots = checked["shots"]
    if not (0 < shots < 1 or (isinstance(shots, int) and shots >= 1)):
        yield f"{checked.show('shots')}: must be a share above 0 and below 1, or a whole number of samples per class"


def _size(checked: ConfigView) -> Iterator[str]:
    checked["task"]
    if pair_of(checked["image_size"]) is None:
        yield f"{checked.show('image_size')}: takes a number of pixels, or [height, width]"


def _evaluators(checked: ConfigView) -> Iterator[str]:
    """A task is an evaluator that has to be there."""
    needed = [evaluator_of(task, checked.get("solver")) for task in as_list(checked["task"])]
    missing = [name for name in needed if name and name not in (checked.config.get("evaluator") or ())]
    if missing:
        yield f"{checked.show('task')}: evaluator={missing[0]} is not among those chosen; leave evaluator out"


OF_EVAL: tuple[Rule, ...] = (_tasks, _floors, _runs, _shots, _size, _evaluators)

FORMATS = ("safetensors", "timm", "transformers", "onnx", "torch_export")

MARK = "<!-- written by jepa-export; a folder with this line is replaced when it is exported again -->"
"""a line of the README.md of every export"""

WRITTEN = {
    *("README.md", "config.json", "model.safetensors", "preprocessor_config.json", "video_preprocessor_config.json"),
    *("model.onnx", "model.onnx.data", "model.pt2"),
}
"""all that an export may consist of"""


def output_folder(run: str, format: str, output: str | None) -> Path | None:
    """Where to write: export/FORMAT in the run's folder unless `output` says so; None where there is no run folder."""
    if output is not None:
        return Path(output).expanduser()
    place = Path(run).expanduser()
    if (place / "checkpoints").is_dir():
        return place / "export" / format
    return place.parent.parent / "export" / format if place.parent.name == "checkpoints" else None


def why_not(folder: Path) -> str:
    """Why an export must not be written there; empty where nothing else would be lost."""
    if not folder.exists():
        return ""
    if not folder.is_dir():
        return f"{folder} is a file; give a folder that does not exist yet"
    found = {path.name for path in folder.iterdir()}
    if not found:
        return ""
    card = folder / "README.md"
    if card.is_file() and MARK in card.read_text(encoding="utf-8", errors="replace"):
        foreign = sorted(found - WRITTEN)
        return f"{folder} holds more than an export ({', '.join(foreign[:3])}); remove it" if foreign else ""
    return f"{folder} is not empty and not from jepa-export; give another folder"


def _format(checked: ConfigView) -> Iterator[str]:
    if (format := checked["format"]) not in FORMATS:
        yield f"{checked.show('format')}: no such format{suggestion(str(format), FORMATS)}; valid: {', '.join(FORMATS)}"


def _places(checked: ConfigView) -> Iterator[str]:
    """What is exported is an encoder, as far as names and small files tell, and nothing is lost where it goes."""
    format, run = checked["format"], str(checked["run"])
    try:
        find_source(run)
    except ValueError as error:
        yield f"{checked.show('run')}: {error}"
        return
    folder = output_folder(run, format, checked.get("output"))
    if folder is None:
        yield f"{checked.show('run')}: has no run folder to write into; give output=FOLDER"
    elif reason := why_not(folder):
        yield f"{checked.show('output') if 'output' in checked else 'output'}: {reason}"


def _hub(checked: ConfigView) -> Iterator[str]:
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", checked["push_to_hub"]):
        yield f"{checked.show('push_to_hub')}: takes OWNER/NAME of a repository on the Hugging Face hub"


OF_EXPORTS: tuple[Rule, ...] = (_format, _places, _hub)
