"""Rules between the keys of `jepa-eval`, `jepa-export` and `jepa-collect`. Without torch."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jepa.config import checkpoints, signatures
from jepa.config.files import as_mapping
from jepa.config.heads import stored_config
from jepa.config.paths import find_source
from jepa.config.view import ConfigView, Rule, check_size
from jepa.suggestions import suggestion

BASELINES = ("pixels", "hog", "dictionary", "untrained")
TASKS = ("knn", "linear", "attentive", "finetune", "inspect")
VECTOR_TASKS = ("knn", "linear")
"""Tasks that need neither tokens nor weights."""


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def evaluator_of(task: str, solver: str | None) -> str | None:
    """Name of the evaluator of a task in the configuration; None for `inspect` and unknown tasks."""
    if task == "linear" and solver == "sgd":
        return "linear_sgd"
    return task if task in TASKS and task != "inspect" else None


def _baselines(view: ConfigView) -> Iterator[str]:
    if view["floors"]:
        yield from _valid_words(view, "floors", BASELINES)


def _valid_words(view: ConfigView, key: str, valid: tuple[str, ...]) -> Iterator[str]:
    words, hint = as_list(view[key]), f"valid: {', '.join(valid)}"
    if not words:
        yield f"{view.describe(key)}: names nothing; {hint}"
    for word in words:
        if word not in valid:
            yield f"{view.describe(key)}: no such {key} {word!r}{suggestion(str(word), valid)}; {hint}"


def _runs(view: ConfigView) -> Iterator[str]:
    tasks, runs, key = as_list(view["task"]), as_list(view["run"]), view.describe("run")
    encoders = [run for run in runs if run not in BASELINES]
    if not runs:
        yield f"{key}: names nothing to judge"
    for run in encoders:
        if not isinstance(run, str):
            yield f"{key}: {run!r} is no path; give the path of a run"
        elif error := _source_error(run):
            yield f"{key}: {error}"
    if "untrained" in runs and not encoders:
        yield f"{key}: untrained is the architecture of a run, and no run is beside it"
    needs_encoder = [task for task in tasks if task in TASKS and task not in VECTOR_TASKS]
    if runs and not encoders and needs_encoder:
        yield f"{view.describe('task', 'run')}: {needs_encoder[0]} needs an encoder; use knn or linear"
    if runs and not encoders and "image_size" not in view:
        yield f"{key}: image_size must be given where no encoder says what it sees"
    if "hog" in runs and find_spec("skimage") is None:
        yield f"{key}: hog needs scikit-image: pip install 'jepa-train[eval]'"


def _source_error(run: str) -> str | None:
    """Why nothing can be read from a source; None if it exists."""
    try:
        find_source(run)
    except ValueError as error:
        path = Path(run).expanduser()
        if ":" in run or path.exists():
            return f"{error}"
        beside = path.parent.iterdir() if os.path.isdir(path.parent) else ()
        siblings = sorted(str(sibling) for sibling in beside if sibling != path)
        return f"{error}; or one of {', '.join(BASELINES)}{suggestion(run, [*siblings, *BASELINES])}"
    return None


def _shots(view: ConfigView) -> Iterator[str]:
    shots = view["shots"]
    if not (0 < shots < 1 or (isinstance(shots, int) and shots >= 1)):
        yield f"{view.describe('shots')}: must be a share above 0 and below 1, or a whole number of samples per class"


def _image_size(view: ConfigView) -> Iterator[str]:
    if "task" in view:
        yield from check_size(view, "image_size")


def _evaluators(view: ConfigView) -> Iterator[str]:
    """The evaluator of each task is in the configuration."""
    names = [evaluator_of(task, view.get("solver")) for task in as_list(view["task"])]
    missing = [name for name in names if name and name not in (view.config.get("evaluator") or ())]
    if missing:
        yield f"{view.describe('task')}: evaluator={missing[0]} is not among those chosen; leave evaluator out"


EVAL_RULES: tuple[Rule, ...] = (
    *(partial(_valid_words, key="task", valid=TASKS), _baselines, _runs, _shots, _image_size, _evaluators),
)

FORMATS = ("safetensors", "timm", "transformers", "onnx", "torch_export")

OTHERS_MODELS = ("timm", "transformers")
"""Formats that are models of another library; their patches are embedded linearly."""

MARK = "<!-- written by jepa-export; a folder with this line is replaced when it is exported again -->"
"""A line of the README.md of every export."""

EXPORT_FILES = {
    *("README.md", "config.json", "model.safetensors", "preprocessor_config.json", "video_preprocessor_config.json"),
    *("model.onnx", "model.onnx.data", "model.pt2"),
}
"""Names of all files that an export may contain."""


def output_folder(run: str, format: str, output: str | None) -> Path | None:
    """The folder to write: `output`, else export/FORMAT in the run's folder; None if there is no run folder."""
    if output is not None:
        return Path(output).expanduser()
    path = Path(run).expanduser()
    if (path / "checkpoints").is_dir():
        return path / "export" / format
    return path.parent.parent / "export" / format if path.parent.name == "checkpoints" else None


def overwrite_error(folder: Path) -> str:
    """Why an export must not be written there; empty if only an earlier export would be lost."""
    if not folder.exists():
        return ""
    if not folder.is_dir():
        return f"{folder} is a file; give a folder that does not exist yet"
    names = {path.name for path in folder.iterdir()}
    if not names:
        return ""
    card = folder / "README.md"
    if card.is_file() and MARK in card.read_text(encoding="utf-8", errors="replace"):
        foreign = sorted(names - EXPORT_FILES)
        return f"{folder} holds more than an export ({', '.join(foreign[:3])}); remove it" if foreign else ""
    return f"{folder} is not empty and not from jepa-export; give another folder"


def _format(view: ConfigView) -> Iterator[str]:
    if (format := view["format"]) not in FORMATS:
        valid = f"{suggestion(str(format), FORMATS)}; valid: {', '.join(FORMATS)}"
        yield f"{view.describe('format')}: no such format{valid}"


def _export_paths(view: ConfigView) -> Iterator[str]:
    """The source is an encoder, judging by names and small files, and the export overwrites nothing else."""
    format, run = view["format"], str(view["run"])
    try:
        find_source(run)
    except ValueError as error:
        yield f"{view.describe('run')}: {error}"
        return
    with suppress(ValueError):  # of a run without a checkpoint, which is refused by its name when it is opened
        stem = as_mapping(stored_config(run).get("encoder", {}), "encoder", {}).get("stem", "linear")
        if stem != "linear" and format in OTHERS_MODELS:
            formats = " or ".join(name for name in FORMATS if name not in OTHERS_MODELS)
            yield f"{view.describe('format')}: the run has encoder.stem={stem}, no model of {format} has; use {formats}"
    folder = output_folder(run, format, view.get("output"))
    if folder is None:
        yield f"{view.describe('run')}: has no run folder to write into; give output=FOLDER"
    elif error := overwrite_error(folder):
        yield f"{view.describe('output') if 'output' in view else 'output'}: {error}"


def _hub(view: ConfigView) -> Iterator[str]:
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", view["push_to_hub"]):
        yield f"{view.describe('push_to_hub')}: takes OWNER/NAME of a repository on the Hugging Face hub"


EXPORT_RULES: tuple[Rule, ...] = (_format, _export_paths, _hub)


RECORDINGS = ("lerobot", "minari", "frames")
"""Formats of recorded episodes that are imported and exported."""


def _kind_and_path(view: ConfigView, key: str) -> Iterator[str]:
    kind, _, path = view[key].partition(":")
    if kind not in RECORDINGS or not path:
        hint = suggestion(kind, RECORDINGS)
        yield f"{view.describe(key)}: takes KIND:PATH with a KIND of {', '.join(RECORDINGS)}{hint}"


BASELINE_POLICIES = ("random", "straight_line", "clone", "policy", "expert", "true_dynamics")


def _plan_baselines(view: ConfigView) -> Iterator[str]:
    if "planner._target_" in view and view["baselines"]:
        yield from _valid_words(view, "baselines", BASELINE_POLICIES)


def _worlds(view: ConfigView) -> Iterator[str]:
    """Runs or an experiment are named, not both, and the runs hold world models that the planner can act in."""
    if "planner._target_" not in view or not view.needs_data:
        return
    runs, experiment = view.get("run"), view.get("experiment")
    if (runs is None) == (experiment is None):
        yield "run and experiment: give one of them, as run=outputs/NAME or experiment=two_rooms"
    for run in as_list(runs) if runs is not None else ():
        yield from _world(view, str(run))


def _world(view: ConfigView, run: str) -> Iterator[str]:
    key = view.describe("run")
    path = checkpoints.locate(Path(run).expanduser())
    if path is None:
        yield f"{key}: {run} holds no checkpoint; give a run folder, as outputs/NAME"
        return
    state = checkpoints.quiet_state(path)
    world = state.get("world")
    if not state:
        return  # a damaged state is refused by its name when it is read
    if not isinstance(world, dict):
        yield f"{key}: {run} holds no world model; train one with objective=dynamics"
        return
    yield from planner_error(view["planner._target_"], run, bool(world.get("num_actions")))


def planner_error(target: str, world: str, is_discrete: bool | None) -> Iterator[str]:
    """Why a planner does not plan the actions of a world; None stands for unknown ones."""
    name, plans_discrete = target.rpartition(".")[2], signatures.traits(target).get("is_discrete", False)
    if None not in (is_discrete, plans_discrete) and is_discrete != plans_discrete:
        kind, other = ("discrete", "categorical_cem") if is_discrete else ("continuous", "cem")
        yield f"planner: {world} has {kind} actions, which {name} does not plan; use planner={other}"


def runs_discrete(runs: Any) -> bool | None:
    """True if the first run that holds a world acts discretely; None if there is none."""
    for run in as_list(runs) if runs is not None else ():
        path = checkpoints.locate(Path(str(run)).expanduser())
        world = checkpoints.quiet_state(path).get("world") if path else None
        if isinstance(world, dict):
            return bool(world.get("num_actions"))
    return None


ENCODERS = ("jepa", "mae", "vae", "autoencoder", "untrained", "pixels")
"""Encoders that compare=encoders knows by name; others are sources of encoder=pretrained."""


def _comparison(view: ConfigView) -> Iterator[str]:
    compare, encoders = view.get("compare"), view["encoders"]
    if compare is None:
        if encoders != list(ENCODERS):
            yield f"{view.describe('encoders')}: needs compare=encoders"
        return
    if compare != "encoders":
        yield f"{view.describe('compare')}: no such comparison{suggestion(str(compare), ['encoders'])}; valid: encoders"
    if view.get("experiment") is None:
        yield f"{view.describe('compare')}: trains its worlds; give experiment= instead of run="
    if not encoders:
        yield f"{view.describe('encoders')}: names nothing; valid: {', '.join(ENCODERS)}"
    for name in (name for name in encoders if name not in ENCODERS):
        try:
            find_source(name)
        except ValueError as error:
            sources = f"{error}" if re.search("[:/]", name) else "a run, timm:NAME or hf:ORG/NAME"
            valid = f"{suggestion(name, ENCODERS)}; valid: {', '.join(ENCODERS)}, or a source of weights ({sources})"
            yield f"{view.describe('encoders')}: no such encoder {name!r}{valid}"


def _horizon(view: ConfigView) -> Iterator[str]:
    if view["planner.horizon"] > view["budget"]:
        both = view.describe("planner.horizon", "budget")
        yield f"{both}: a plan is longer than an episode; use a shorter horizon or a larger budget"
    if view.get("planner.execute", 1) > view["planner.horizon"]:
        both = view.describe("planner.execute", "planner.horizon")
        yield f"{both}: more steps are executed than planned"


PLAN_RULES: tuple[Rule, ...] = (_plan_baselines, _comparison, _worlds, _horizon)
COLLECT_RULES: tuple[Rule, ...] = (partial(_kind_and_path, key="source"), partial(_kind_and_path, key="export"))
