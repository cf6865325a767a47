"""What must hold between the keys of a configuration, one rule for each connection. Without torch."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from jepa import signatures
from jepa.catalogue import find, flatten, suggestion
from jepa.geometry import mask_faults, show_grid
from jepa.schema import show_value
from jepa.types import PatchGrid

Show = Callable[[str], str]
"""Dotted key -> the override that set it, or its value and the file."""

AT_LEAST_ONE = (
    *(
        "epochs",
        "steps",
        "batch_size",
        "micro_batch_size",
        "num_frames",
        "augment.views",
        "log_every",
        "eval_every",
        "save_every",
        "keep",
    ),
    *("encoder.depth", "encoder.num_heads", "encoder.embed_dim", "encoder.tubelet_size"),
    *(
        "predictor.depth",
        "predictor.num_heads",
        "predictor.width",
        "evaluation.train_samples",
        "evaluation.val_samples",
        "evaluation.batch_size",
    ),
)
NOT_NEGATIVE = ("seed", "num_workers", "schedule.warmup_ratio", "schedule.warmup_epochs")
ABOVE_ZERO = ("lr", "clip_grad", "spike_guard")
PRECISIONS = ("auto", "bf16", "fp32")
POSITIONS = ("sincos", "rope", "vjepa2")
PHASE_KEYS = ("share", "image_size", "num_frames", "micro_batch_size")


class AbsentError(KeyError):
    """A rule needs a value that is not there, or that is already refused."""


class Checked(Mapping[str, Any]):
    """A configuration by dotted key, without the values that are null, not given, or already refused."""

    def __init__(self, config: Mapping[str, Any], show: Show, refused: set[str]) -> None:
        self.config = config
        self.show = show
        self.refused = refused
        self._values = {k: v for k, v in flatten(config) if k not in refused and v is not None and v != "???"}

    def changed(self, values: Mapping[str, Any]) -> Checked:
        """The same configuration with other values of some top-level keys."""

        def show(key: str) -> str:
            return f"{key}={show_value(values[key])}" if key in values else self.show(key)

        return Checked({**self.config, **values}, show, self.refused - set(values))

    def __getitem__(self, key: str) -> Any:
        if key not in self._values:
            raise AbsentError(key)
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


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
        yield from _not_divisible(checked, "image_size", size, "encoder.patch_size", patch)


def _frames(checked: Checked) -> Iterator[str]:
    """A single frame is an image, which the encoder repeats to fill a tubelet."""
    if checked["num_frames"] > 1:
        tubelet = checked["encoder.tubelet_size"]
        yield from _not_divisible(checked, "num_frames", checked["num_frames"], "encoder.tubelet_size", tubelet)


def _not_divisible(checked: Checked, size_key: str, size: int, patch_key: str, patch: int) -> Iterator[str]:
    if patch > 0 and size % patch:
        below = size // patch * patch
        near = ", ".join(str(side) for side in (below, below + patch) if side)
        both = f"{checked.show(size_key)} with {checked.show(patch_key)}"
        yield f"{both}: {size} is not divisible by {patch}; nearest: {near}"


def _images_only(checked: Checked) -> Iterator[str]:
    """The constructor of a data set of clips takes `num_frames`."""
    try:
        signature = signatures.read(checked["dataset._target_"]) if checked["num_frames"] > 1 else None
    except LookupError:
        return
    if signature is not None and not signature.takes_more and "num_frames" not in signature.parameters:
        yield f"{checked.show('num_frames')}: {signature.name} delivers images: num_frames=1"


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
    heads, width, section = checked[heads_key], checked[width_key], width_key.partition(".")[0]
    position = checked.get(f"{section}.position", "sincos")
    if heads > 0 and width % heads:
        both = f"{checked.show(width_key)} with {checked.show(heads_key)}"
        valid = [n for n in range(1, 65) if width % n == 0]
        near = sorted(sorted(valid, key=lambda n: abs(n - heads))[:2])
        yield f"{both}: {heads} heads do not divide a width of {width}; nearest: {', '.join(map(str, near))} heads"
    elif position == "sincos" and width % 4:
        yield f"{checked.show(width_key)}: sin-cos positions need a width divisible by 4"
    elif position in ("rope", "vjepa2") and heads > 0 and (width // heads < 6 or width // heads % 2):
        keys = f"{checked.show(f'{section}.position')} with {checked.show(width_key)} and {checked.show(heads_key)}"
        yield f"{keys}: rotary positions need heads of an even width of at least 6, not {width // heads}"


def _positions(checked: Checked) -> Iterator[str]:
    for section in ("encoder", "predictor"):
        key, target = f"{section}.position", checked.get(f"{section}._target_", "")
        if target.startswith("jepa.") and (position := checked.get(key, "sincos")) not in POSITIONS:
            valid = f"{suggestion(str(position), POSITIONS)}; valid: {', '.join(POSITIONS)}"
            yield f"{checked.show(key)}: no such position embedding{valid}"


def _mask(checked: Checked) -> Iterator[str]:
    sizes, patches = _pair(checked["image_size"]), _pair(checked["encoder.patch_size"])
    if sizes is None or patches is None or sizes[0] < patches[0] or sizes[1] < patches[1]:
        return
    steps = checked["num_frames"] // max(1, checked.get("encoder.tubelet_size", 1))
    grid = PatchGrid(max(1, steps), sizes[0] // patches[0], sizes[1] // patches[1])
    node = {key.removeprefix("mask."): value for key, value in checked.items() if key.startswith("mask.")}
    node |= {key: value for key, value in checked.config["mask"].items() if value is None}
    for fault in mask_faults(node, grid):
        name = fault.partition("=")[0]
        sentence = fault.removeprefix(f"{name}={find(node, name)} ")
        keys, tokens = ("image_size", "encoder.patch_size"), f", {show_grid(grid)} tokens"
        if name == "horizon":
            keys, tokens = ("num_frames", "encoder.tubelet_size"), ""
        sizes_shown = f" with {' and '.join(checked.show(key) for key in keys if key in checked)}{tokens}"
        yield f"{checked.show(f'mask.{name}')}{'' if sentence.startswith('must') else sizes_shown}: {sentence}"


def _compared(checked: Checked) -> Iterator[str]:
    """Regularisers that compare crops need several of them, those that compare time steps a clip."""
    for name, node in (checked.config.get("regularizer") or {}).items():
        if not isinstance(node, Mapping):
            continue
        path, target = f"regularizer.{name}", str(node.get("_target_")).rpartition(".")[2]
        between = checked.get(f"{path}.between", "crops") if target == "CrossView" else None
        invariance = f"{path}.invariance" if checked.get(f"{path}.invariance", 0) > 0 else None
        if (invariance or between == "crops") and checked["augment.views"] < 2:
            which = checked.show(invariance or f"{path}.between")
            yield f"{which} with {checked.show('augment.views')}: compares crops of a sample; set augment.views=2"
        if (between == "frames" or target == "TemporalSimilarity") and checked["num_frames"] < 2:
            yield f"{checked.show(path)} with {checked.show('num_frames')}: compares the time steps of a clip"


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


def _folders(checked: Checked) -> Iterator[str]:
    root = checked["dataset.root_path"]
    kinds = {"dataset.image_folder": "IMAGE.jpg", "dataset.video_folder": "VIDEO.mp4"}
    file = next((kinds[key] for key in kinds if key in checked), "")
    for key in (*kinds, "dataset.val_folder"):
        if key not in checked:
            continue
        folder = Path(root).expanduser().absolute() / checked[key]
        if not folder.is_dir():
            both = f"{checked.show('dataset.root_path')} with {checked.show(key)}"
            layout = f"{folder}/CLASS/{file}, or {folder}/{file} without labels"
            yield f"{both}: there is no folder {folder}; {_what_is_there(folder)}; expected {layout}"
            return


def _clips(checked: Checked) -> Iterator[str]:
    if "dataset.fps" in checked and checked["dataset.stride"] != 1:
        both = f"{checked.show('dataset.fps')} with {checked.show('dataset.stride')}"
        yield f"{both}: give one of them; frames are chosen by time or by number"


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


def _phases(checked: Checked) -> Iterator[str]:
    """Phases have shares that sum to 1, and each has sizes that a run could have."""
    phases = checked["phases"]
    known = set(_apply(OF_SIZES, checked))
    for number, phase in enumerate(phases):
        yield from (f"phases[{number}]: {fault}" for fault in _phase(checked, phase) if fault not in known)
    shares = [phase["share"] for phase in phases if isinstance(phase, Mapping) and _is_share(phase.get("share"))]
    if phases and len(shares) == len(phases) and abs(sum(shares) - 1) > 1e-6:
        yield f"{checked.show('phases')}: the shares sum to {sum(shares):.6g}, not to 1"


def _phase(checked: Checked, phase: Any) -> Iterator[str]:
    if not isinstance(phase, Mapping):
        yield f"{show_value(phase)} is no phase; its keys: {', '.join(PHASE_KEYS)}"
        return
    for key in [key for key in phase if key not in PHASE_KEYS]:
        valid = f"{suggestion(key, PHASE_KEYS)}; valid: {', '.join(PHASE_KEYS)}"
        yield f"{key}={show_value(phase[key])}: a phase has no such key{valid}"
    if not _is_share(phase.get("share")):
        yield f"share={show_value(phase.get('share'))}: must be a number above 0, the share of the steps of the run"
    wrong = {
        key: value
        for key, value in phase.items()
        if (key == "image_size" and _pair(value) is None)
        or (key == "num_frames" and not _is_whole(value))
        or (key == "micro_batch_size" and value is not None and not _is_whole(value))
    }
    for key, value in wrong.items():
        of_two = ", or [height, width]" if key == "image_size" else ""
        yield f"{key}={show_value(value)}: must be a whole number of at least 1{of_two}"
    sizes = {key: value for key, value in phase.items() if key in PHASE_KEYS[1:] and key not in wrong}
    yield from _apply(OF_SIZES, checked.changed(sizes))


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _apply(rules: Iterable[Rule], checked: Checked) -> Iterator[str]:
    for rule in rules:
        with suppress(AbsentError):
            yield from rule(checked)


def faults_between(checked: Checked) -> list[str]:
    """Every rule that is broken, one sentence each."""
    return list(_apply(RULES, checked))


Rule = Callable[[Checked], Iterator[str]]

OF_SIZES: tuple[Rule, ...] = (_image_size, _frames, _images_only, _mask, _compared, _batch)
"""Rules that a phase of other sizes can break."""

RULES: tuple[Rule, ...] = (
    _bounds,
    _words,
    _ranges,
    _heads,
    _positions,
    *OF_SIZES,
    _phases,
    _warmup,
    _folders,
    _clips,
    _downloaded,
    _local_path,
)
