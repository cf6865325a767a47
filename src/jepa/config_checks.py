"""What a configuration cannot be: refused in words before anything is built. Works on plain dicts, without torch."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from jepa import signatures
from jepa.catalogue import Catalogue, Choice, find, flatten, nearest, suggestion
from jepa.geometry import mask_faults
from jepa.types import PatchGrid

Show = Callable[[str], str]
"""Dotted key -> the override that set it, or its value and the file."""

WIRED = {
    "encoder": {"clip_shape"},
    "mask": {"grid"},
    "predictor": {"grid", "embed_dim"},
    "objective": {"encoder", "predictor", "regularizer", "batch_size", "total_steps"},
    "dataset": set(),
    "regularizer": set(),
    "optimizer": {"params", "lr", "weight_decay"},
    "schedule": {"total_steps", "steps_per_epoch", "lr"},
    "evaluator": set(),
    "logger": {"folder", "config", "run_id", "resume_step"},
}
"""Group -> the constructor arguments that Python gives; they are no keys."""

SECTIONS = {"augment": "jepa.schema.AugmentConfig", "evaluation": "jepa.schema.EvaluationConfig"}

MANY = {"evaluator", "logger"}
"""Groups of which several choices run together, each under its own name."""

OPTIONAL = {"regularizer", "evaluator", "logger"}

AT_LEAST_ONE = (
    *(
        "epochs",
        "steps",
        "batch_size",
        "micro_batch_size",
        "num_frames",
        "log_every",
        "eval_every",
        "save_every",
        "keep",
    ),
    *("encoder.depth", "encoder.num_heads", "encoder.embed_dim", "predictor.depth", "predictor.num_heads"),
    *("predictor.width", "evaluation.train_samples", "evaluation.val_samples", "evaluation.batch_size"),
)
NOT_NEGATIVE = ("seed", "num_workers", "schedule.warmup_ratio", "schedule.warmup_epochs")
ABOVE_ZERO = ("lr", "clip_grad", "spike_guard")
PRECISIONS = ("auto", "bf16", "fp32")


class AbsentError(KeyError):
    """A rule needs a value that is not there, or that is already refused."""


class Checked(Mapping[str, Any]):
    """A configuration by dotted key, without the values that are null, not given, or already refused."""

    def __init__(self, config: Mapping[str, Any], show: Show, refused: set[str]) -> None:
        self.config = config
        self.show = show
        self._values = {k: v for k, v in flatten(config) if k not in refused and v is not None and v != "???"}

    def __getitem__(self, key: str) -> Any:
        if key not in self._values:
            raise AbsentError(key)
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def faults(config: Mapping[str, Any], schema: signatures.Signature, show: Show) -> list[str]:
    """All that is wrong with a composed configuration, one sentence each."""
    found = dict(_wrong_values(config, schema, show))
    missing = [f"{show(key)}: must be given, as {key}=VALUE" for key, value in flatten(config) if value == "???"]
    checked = Checked(config, show, set(found))
    crossed = []
    for rule in RULES:
        with suppress(AbsentError):
            crossed.extend(rule(checked))
    return [*found.values(), *crossed, *missing]


def unknown_key(text: str, key: str, config: Mapping[str, Any], catalogue: Catalogue) -> str:
    """Why the override `text` sets nothing: what has such a key, or which key was meant."""
    section, _, leaf = key.rpartition(".")
    group = key.partition(".")[0]
    if others := catalogue.keys.get(key):
        return f"{text}: the chosen {group} has no {leaf!r}; {_choices(others)} has"
    node = find(config, section) if section else None
    if isinstance(node, Mapping) and _takes(node.get("_target_"), leaf, group):
        return f"{text}: is not in the configuration, but {node['_target_']} takes it: write +{text}"
    known = {path for path, _ in flatten(config) if not path.startswith("hydra.") and not path.endswith("_target_")}
    near = nearest(key, known | set(catalogue.groups) | set(catalogue.keys))
    elsewhere = {
        name: f" (with {_choices(catalogue.keys[name])})" for name in near if name in catalogue.keys.keys() - known
    }
    meant = " or ".join(f'"{name}"{elsewhere.get(name, "")}' for name in near)
    return f'{text}: there is no key "{key}"' + (
        f"; did you mean {meant}?" if meant else "; jepa-train --help lists them"
    )


def _choices(choices: Sequence[Choice]) -> str:
    return f"{choices[0].group}={', '.join(choice.name for choice in choices)}"


def _takes(target: Any, name: str, group: str) -> bool:
    try:
        signature = signatures.read(target) if isinstance(target, str) else None
    except LookupError:
        return False
    return signature is not None and name in signature.parameters and name not in WIRED.get(group, set())


def _wrong_values(config: Mapping[str, Any], schema: signatures.Signature, show: Show) -> Iterator[tuple[str, str]]:
    """(key, sentence) of every key that nothing reads, of every value of the wrong type, of what is lacking."""
    plain = {key: value for key, value in config.items() if key not in WIRED}
    yield from _against(schema, plain, "", show, given=set(WIRED))
    for name, section in SECTIONS.items():
        signature, values = signatures.read(section), config.get(name)
        if signature is not None and isinstance(values, Mapping):
            yield from _against(signature, values, f"{name}.", show, given=set())
        elif signature is not None:
            yield name, f"{show(name)}: takes the keys {', '.join(signature.parameters)}, not {_kind(values)}"
    for group, wired in WIRED.items():
        node = config.get(group) or {}
        for path, part in ((f"{group}.{name}", node[name]) for name in node) if group in MANY else [(group, node)]:
            if part or group not in OPTIONAL:
                yield from _component(path, part, wired, show)


def _component(path: str, node: Any, wired: set[str], show: Show) -> Iterator[tuple[str, str]]:
    target = node.get("_target_") if isinstance(node, Mapping) else None
    if not isinstance(target, str):
        yield path, f"{path}: lacks a _target_, the class to build ({show(path)})"
        return
    try:
        signature = signatures.read(target)
    except LookupError as error:
        yield f"{path}._target_", f"{show(f'{path}._target_')}: {error.args[0]}"
        return
    arguments = {key: value for key, value in node.items() if not key.startswith("_")}
    if signature is not None:
        yield from _against(signature, arguments, f"{path}.", show, given=wired)
    for key, value in arguments.items():
        if isinstance(value, Mapping) and "_target_" in value:
            yield from _component(f"{path}.{key}", value, set(), show)


def _against(
    signature: signatures.Signature, values: Mapping[str, Any], prefix: str, show: Show, given: set[str]
) -> Iterator[tuple[str, str]]:
    parameters = signature.parameters
    own = [name for name in parameters if name not in given]
    for name, value in values.items():
        key = f"{prefix}{name}"
        parameter = parameters.get(name)
        if name in given:
            yield key, f"{show(key)}: is worked out by the program, it cannot be set{_instead(name)}"
        elif parameter is None and not signature.takes_more:
            reader = signature.name if prefix else "the program"
            yield key, f"{show(key)}: {reader} has no {name!r}{suggestion(name, own)}"
        elif parameter is not None and not _fits(parameter, key, value):
            yield key, f"{show(key)}: takes {signatures.describe(parameter.annotation)}, not {_kind(value)}"
    for name, parameter in parameters.items():
        if parameter.is_required and name not in values and name not in given:
            yield f"{prefix}{name}", f"{prefix}{name}: is lacking, {signature.name} needs it; add +{prefix}{name}=VALUE"


def _fits(parameter: signatures.Parameter, key: str, value: Any) -> bool:
    if value == "???" or (isinstance(value, Mapping) and "_target_" in value):
        return True
    if key == "predictor.num_heads" and value is None:
        return True  # those of the encoder
    if key == "name":
        return isinstance(value, str | int | float)  # name=2024 is a name
    return signatures.fits(parameter.annotation, value)


def _instead(name: str) -> str:
    keys = {"lr": "lr", "weight_decay": "schedule.weight_decay", "batch_size": "batch_size"}
    return f"; use {keys[name]}" if name in keys else ""


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return f"the text {value!r}"
    return "null" if value is None else f"{str(value).lower() if isinstance(value, bool) else value}"


def _bounds(checked: Checked) -> Iterator[str]:
    numbers = {key: value for key, value in checked.items() if isinstance(value, int | float)}
    for key in numbers.keys() & set(AT_LEAST_ONE):
        if numbers[key] < 1:
            yield f"{checked.show(key)}: must be at least 1"
    for key in numbers.keys() & set(NOT_NEGATIVE):
        if numbers[key] < 0:
            yield f"{checked.show(key)}: must not be negative"
    for key in numbers.keys() & set(ABOVE_ZERO):
        if not numbers[key] > 0:
            yield f"{checked.show(key)}: must be above 0"


def _words(checked: Checked) -> Iterator[str]:
    if checked.get("precision", "auto") not in PRECISIONS:
        yield f"{checked.show('precision')}: no such precision; valid: {', '.join(PRECISIONS)}"
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", checked.get("device", "auto")):
        yield f"{checked.show('device')}: no such device; valid: auto, cpu, cuda, cuda:0, cuda:1 ..."
    name = str(checked.get("name", "-"))
    if not name or Path(name).is_absolute() or ".." in Path(name).parts:
        yield f"{checked.show('name')}: names a folder below outputs/, so no absolute path and no '..'"


def _ranges(checked: Checked) -> Iterator[str]:
    """Shares of an area and aspect ratios of the augmentation; those of masks are checked with the grid."""
    for key, upper in (("augment.crop_scale", 1.0), ("augment.crop_aspect", float("inf"))):
        bounds = checked[key]
        if len(bounds) != 2 or not 0 < bounds[0] <= bounds[1] <= upper:
            limit = f" and at most {upper:g}" if upper < float("inf") else ""
            yield f"{checked.show(key)}: must be two numbers, the smaller first, above 0{limit}"


def _pair(value: Any) -> tuple[int, int] | None:
    """(height, width) of a whole number or two of them, None of anything else."""
    pair: list[Any] = value if isinstance(value, list) else [value, value]
    if len(pair) != 2 or not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in pair):
        return None
    return pair[0], pair[1]


def _image_size(checked: Checked) -> Iterator[str]:
    sizes = _pair(checked["image_size"])
    if sizes is None:
        yield f"{checked.show('image_size')}: takes a number of pixels, or [height, width]"
        return
    patches = _pair(checked["encoder.patch_size"])
    if patches is None:
        yield f"{checked.show('encoder.patch_size')}: takes a number of pixels, or [height, width]"
        return
    for size, patch in dict.fromkeys(zip(sizes, patches, strict=True)):
        if size % patch:
            below = size // patch * patch
            near = ", ".join(str(side) for side in (below, below + patch) if side)
            both = f"{checked.show('image_size')} with {checked.show('encoder.patch_size')}"
            yield f"{both}: {size} is not divisible by {patch}; nearest: {near}"


def _frames(checked: Checked) -> Iterator[str]:
    if checked["encoder._target_"].endswith(".SpatialEncoder") and checked["num_frames"] > 1:
        yield f"{checked.show('num_frames')}: images have one frame, and this encoder is for images; num_frames=1"


def _heads(checked: Checked) -> Iterator[str]:
    found = list(_divides(checked, "encoder.num_heads", "encoder.embed_dim"))
    yield from found
    if "predictor.num_heads" in checked:
        yield from _divides(checked, "predictor.num_heads", "predictor.width")
    elif not found:
        yield from _divides(checked, "encoder.num_heads", "predictor.width")


def _divides(checked: Checked, heads_key: str, width_key: str) -> Iterator[str]:
    if heads_key not in checked or width_key not in checked:
        return
    heads, width = checked[heads_key], checked[width_key]
    if heads > 0 and width % heads:
        both = f"{checked.show(width_key)} with {checked.show(heads_key)}"
        valid = [n for n in range(1, 65) if width % n == 0]
        near = sorted(sorted(valid, key=lambda n: abs(n - heads))[:2])
        yield f"{both}: {heads} heads do not divide a width of {width}; nearest: {', '.join(map(str, near))} heads"
    elif width % 4:
        yield f"{checked.show(width_key)}: the 2-D sin-cos positions need a width divisible by 4"


def _mask(checked: Checked) -> Iterator[str]:
    sizes, patches = _pair(checked["image_size"]), _pair(checked["encoder.patch_size"])
    if sizes is None or patches is None or sizes[0] < patches[0] or sizes[1] < patches[1]:
        return
    height, width = sizes[0] // patches[0], sizes[1] // patches[1]
    node = {key.removeprefix("mask."): value for key, value in checked.items() if key.startswith("mask.")}
    node |= {key: value for key, value in checked.config["mask"].items() if value is None}
    for fault in mask_faults(node, PatchGrid(1, height, width)):
        name = fault.partition("=")[0]
        sentence = fault.removeprefix(f"{name}={node.get(name)} ")
        grid = f" with {checked.show('image_size')} and {checked.show('encoder.patch_size')}, {height}x{width} tokens"
        yield f"{checked.show(f'mask.{name}')}{'' if sentence.startswith('must') else grid}: {sentence}"


def _warmup(checked: Checked) -> Iterator[str]:
    epochs, steps = "schedule.warmup_epochs", checked.get("steps")
    if epochs not in checked:
        if checked["schedule.warmup_ratio"] >= 1:
            yield f"{checked.show('schedule.warmup_ratio')}: a warm-up as long as the run; it must be below 1"
    elif steps is None and checked[epochs] >= checked["epochs"]:
        yield f"{checked.show(epochs)} with {checked.show('epochs')}: the warm-up must be shorter than the run"
    elif steps is not None and "dataset.num_samples" in checked:
        warmup = round(checked[epochs] * (checked["dataset.num_samples"] // checked["batch_size"]))
        if warmup >= steps:
            both = f"{checked.show(epochs)} with {checked.show('steps')}"
            yield f"{both}: a warm-up of {warmup} steps, the run must be longer"


def _batch(checked: Checked) -> Iterator[str]:
    whole, part = checked["batch_size"], checked.get("micro_batch_size")
    if part and part > 0 and whole % part:
        both = f"{checked.show('micro_batch_size')} with {checked.show('batch_size')}"
        yield f"{both}: {part} does not divide {whole}"
    samples = checked.get("dataset.num_samples", whole)
    if samples < whole:
        both = f"{checked.show('batch_size')} with {checked.show('dataset.num_samples')}"
        yield f"{both}: the data set is smaller than one batch"


def _image_folder(checked: Checked) -> Iterator[str]:
    root = checked["dataset.root_path"]
    for key in ("dataset.image_folder", "dataset.val_folder"):
        if key not in checked:
            continue
        folder = Path(root).expanduser().absolute() / checked[key]
        if not folder.is_dir():
            both = f"{checked.show('dataset.root_path')} with {checked.show(key)}"
            layout = f"{folder}/CLASS/IMAGE.jpg, or {folder}/IMAGE.jpg without labels"
            yield f"{both}: there is no folder {folder}; {_what_is_there(folder)}; expected {layout}"
            return


def _downloaded(checked: Checked) -> Iterator[str]:
    folder = Path(checked["dataset.root_path"]).expanduser().absolute()
    if not checked["dataset.download"] and not folder.is_dir():
        shown = checked.show("dataset.root_path")
        yield f"{shown}: there is no folder {folder}; {_what_is_there(folder)}; dataset.download=true fetches the data"


def _local_path(checked: Checked) -> Iterator[str]:
    """A name on the hub has at most one slash and no dot in front; any other `path` lies on this machine."""
    path = checked["dataset.path"]
    is_local = path.startswith(("/", ".", "~")) or path.endswith(".parquet") or path.count("/") > 1
    absolute = Path(path).expanduser().absolute()
    if is_local and not any(sign in path for sign in "*?[") and not absolute.exists():
        yield f"{checked.show('dataset.path')}: there is no {absolute}; {_what_is_there(absolute)}"


def _what_is_there(path: Path) -> str:
    """The nearest folder above that exists, and what it holds."""
    found = next(parent for parent in path.parents if parent.is_dir())
    names = sorted(entry.name + "/" * entry.is_dir() for entry in os.scandir(found) if not entry.name.startswith("."))
    listing = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    return f"{found} holds {listing or 'nothing'}"


RULES: tuple[Callable[[Checked], Iterator[str]], ...] = (
    _bounds,
    _words,
    _ranges,
    _image_size,
    _frames,
    _heads,
    _mask,
    _warmup,
    _batch,
    _image_folder,
    _downloaded,
    _local_path,
)
