"""Rules between the keys of a configuration, one for each connection. Without torch."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from jepa.config import signatures
from jepa.config.catalogue import Catalogue, components, conf_folder, find
from jepa.config.command_rules import COLLECT_RULES, EVAL_RULES, EXPORT_RULES, PLAN_RULES
from jepa.config.paths import find_source, shape_of
from jepa.config.rl_rules import RL_RULES
from jepa.config.schema import show_value
from jepa.config.use_rules import USE_RULES
from jepa.config.view import ConfigView, MissingValue, Rule, check_size, hides_tokens, not_divisible, pair_of
from jepa.errors import explain
from jepa.masks.geometry import show_grid
from jepa.resources.hardware import GPUS
from jepa.suggestions import near_multiples, suggestion
from jepa.types import PatchGrid

MAX_NAME_BYTES = 255
PHASE_KEYS = ("share", "image_size", "num_frames", "micro_batch_size")


def _words(view: ConfigView) -> Iterator[str]:
    if isinstance(threads := view.get("threads", "auto"), str) and threads != "auto":
        yield f"{view.describe('threads')}: must be auto or a whole number above 0"
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", view.get("device", "auto")):
        yield f"{view.describe('device')}: no such device; valid: auto, cpu, cuda, cuda:0, cuda:1 ... and mps"
    if not re.fullmatch(r"[\w*?-]+/[\w*?-]+", view.get("evaluation.judge", "probe/*")):
        yield f"{view.describe('evaluation.judge')}: metrics have names with a slash, as probe/knn_top1, predict/gain"
    yield from _name(view)


def _name(view: ConfigView) -> Iterator[str]:
    """The name is a path below outputs/ that file systems take."""
    name, key = view.get("name", "-"), view.describe("name")
    if not isinstance(name, str):
        yield f"{key}: YAML reads this as {type(name).__name__}, not as text; put the name in quotes"
    elif not name.isprintable() or name != name.strip():
        yield f"name={name!r}: names a folder, so no line breaks, control characters or spaces at its ends"
    elif not Path(name).parts or Path(name).is_absolute() or ".." in Path(name).parts:
        yield f"{key}: names a folder below outputs/, so no absolute path and neither '.' nor '..'"
    elif long := [part for part in Path(name).parts if len(os.fsencode(part)) > MAX_NAME_BYTES]:
        length = len(os.fsencode(long[0]))
        yield f"name={name[:40]}...: file systems take names of {MAX_NAME_BYTES} bytes, and this has {length}"


def folder_name_errors(label: str) -> list[str]:
    """An error if the overrides of a member of a sweep are too long for the name of its folder."""
    if (length := len(os.fsencode(label))) <= MAX_NAME_BYTES:
        return []
    advice = "sweep fewer keys at once, with the other values in a file conf/experiment/NAME.yaml"
    name = f"the folder of this run would have a name of {length} bytes"
    return [f"{label[:80]}...: {name}, and file systems take {MAX_NAME_BYTES}: {advice}"]


def _whole_patches(view: ConfigView, key: str) -> Iterator[str]:
    """An image size is divisible by the patch size."""
    yield from check_size(view, key)
    yield from check_size(view, "encoder.patch_size")
    sizes, patches = pair_of(view[key]), pair_of(view["encoder.patch_size"])
    for size, patch in dict.fromkeys(zip(sizes or (), patches or (), strict=False)):
        yield from not_divisible(view, key, size, "encoder.patch_size", patch)


def _stem(view: ConfigView) -> Iterator[str]:
    """A stem of convolutions halves patches, the cells of a dictionary fill them, and other stems have no such keys."""
    stem, patches = view["encoder.stem"], pair_of(view["encoder.patch_size"])
    both = view.describe("encoder.stem", "encoder.patch_size")
    if stem in ("conv", "residual") and any(patch % 2 for patch in patches or ()):
        yield f"{both}: its convolutions halve a patch, whose sides must be even"
    elif stem == "dictionary" and any(patch % 4 for patch in patches or ()):
        yield f"{both}: its cells have 4 pixels a side, and the sides of a patch must be multiples of that"
    if stem == "linear" and view.get("encoder.stem_width"):
        yield f"{view.describe('encoder.stem_width')}: encoder.stem=linear has no width; choose another stem"
    if stem != "dictionary" and view.get("encoder.stem_frozen", 1) < 1:
        yield f"{view.describe('encoder.stem_frozen')}: encoder.stem={stem} always learns; only a dictionary is frozen"


def _frames(view: ConfigView) -> Iterator[str]:
    """The encoder repeats a single frame to fill a tubelet."""
    if view["num_frames"] > 1:
        tubelet = view["encoder.tubelet_size"]
        yield from not_divisible(view, "num_frames", view["num_frames"], "encoder.tubelet_size", tubelet)


def _images_only(view: ConfigView) -> Iterator[str]:
    """The constructor of a data set of clips takes `num_frames`."""
    signature = signatures.read_if_known(view["dataset._target_"]) if view["num_frames"] > 1 else None
    if signature is not None and not signature.accepts("num_frames"):
        yield f"{view.describe('num_frames')}: {signature.name} delivers images: num_frames=1"


def _heads(view: ConfigView) -> Iterator[str]:
    errors = list(_check_heads(view, "encoder.num_heads", "encoder.embed_dim"))
    yield from errors
    if "predictor.num_heads" in view:
        yield from _check_heads(view, "predictor.num_heads", "predictor.width")
    elif not errors:
        yield from _check_heads(view, "encoder.num_heads", "predictor.width")


def _check_heads(view: ConfigView, heads_key: str, width_key: str) -> Iterator[str]:
    if heads_key not in view or width_key not in view:
        return
    heads, width, section = view[heads_key], view[width_key], width_key.partition(".")[0]
    position = view.get(f"{section}.position", "sincos")
    if heads > 0 and width % heads:
        valid = [n for n in range(1, 65) if width % n == 0]
        near = ", ".join(map(str, sorted(sorted(valid, key=lambda n: abs(n - heads))[:2])))
        both = view.describe(width_key, heads_key)
        yield f"{both}: {heads} heads do not divide a width of {width}; nearest: {near} heads"
    elif position in ("sincos", "table") and width % 4:
        yield f"{view.describe(width_key)}: sin-cos positions need a width divisible by 4"
    elif position in ("rope", "vjepa2") and heads > 0 and (width // heads < 6 or width // heads % 2):
        keys = f"{view.describe(f'{section}.position', width_key)} and {view.describe(heads_key)}"
        yield f"{keys}: rotary positions need heads of an even width of at least 6, not {width // heads}"


def _weights(view: ConfigView) -> Iterator[str]:
    """The weights that an encoder starts from exist and read as many channels, judging by names and small files."""
    try:
        source = find_source(view["encoder.weights"])
        shape = shape_of(source)
    except ValueError as error:
        yield f"{view.describe('encoder.weights')}: {error}"
        return
    keys = ("dataset.env.channels", "dataset.channels")
    key, channels = next(((key, view[key]) for key in keys if isinstance(view.get(key), int)), ("", None))
    if shape and channels and shape[0] != channels:
        both = view.describe("encoder.weights", key)
        yield f"{both}: {source} reads {shape[0]} channels, the data set has {channels}: choose a data set with as many"


def _decoder(view: ConfigView) -> Iterator[str]:
    """By default the pixel decoder has half the encoder's width and as many heads."""
    if "objective.decoder_depth" not in view:
        return
    width = view.get("objective.decoder_width", view["encoder.embed_dim"] // 2)
    heads = view.get("objective.decoder_num_heads", view["encoder.num_heads"])
    if min(width, heads) >= 1 and (width % heads or width % 4):
        both = view.describe("objective.decoder_width", "objective.decoder_num_heads")
        yield f"{both}: a decoder of width {width} and {heads} heads: 4 and the heads must divide the width"


def _components(view: ConfigView) -> Iterator[str]:
    """The `rules` of each component's class: paths of functions of the view and of the component's section."""
    for path, node in components(view.config):
        for name in signatures.traits(str(node["_target_"])).get("rules", ()):
            yield from _apply([partial(_function(name), path=path)], view)


def _function(path: str) -> Callable[..., Any]:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def _fields(view: ConfigView) -> Iterator[str]:
    """A data set has the fields that the objective `needs`; a foreign one that declares none is not checked."""
    target, objective = view["dataset._target_"], view["objective._target_"]
    fields = signatures.traits(target).get("fields", () if target.startswith("jepa.") else None)
    for field in sorted({*signatures.traits(objective).get("needs", ())} - {"labels"}):
        if fields is not None and field not in fields:
            learner, data = (name.rpartition(".")[2] for name in (objective, target))
            lacks = f"{learner} learns from {field}, and {data} has none"
            yield f"{view.describe('objective')}: {lacks}; {_datasets_with(field)}"


def _datasets_with(field: str) -> str:
    """A hint with the choices of conf/dataset that have a field."""
    choices = Catalogue([conf_folder()]).groups["dataset"].values()
    targets = {choice.name: choice.values.get("dataset._target_", "") for choice in choices}
    names = [name for name, target in targets.items() if field in signatures.traits(target).get("fields", ())]
    return f"choose dataset={' or '.join(names)}" if names else "a data set declares it in its `fields`"


def _colours(view: ConfigView) -> Iterator[str]:
    channels = view.get("dataset.channels", 3)
    if view.get("augment.grayscale", 0) > 0 and channels != 3:
        reason = "the pictures are grey already" if channels == 1 else f"pictures of {channels} channels have no colour"
        yield f"{view.describe('augment.grayscale')}: {reason}; set it to 0"


def _local_views(view: ConfigView) -> Iterator[str]:
    """Smaller crops are cut into patches and compared with the other, unmasked views."""
    if view["augment.local_views"] < 1:
        return
    key = view.describe("augment.local_views")
    if hides_tokens(view):
        masker = view["mask._target_"].rpartition(".")[2]
        yield f"{key} with {masker}: smaller crops are compared with whole views, of which none is masked; mask=none"
    elif not view.config.get("regularizer"):
        yield f"{key} without a regularizer: nothing compares the crops; regularizer=[cross_view,sigreg]"
    yield from _whole_patches(view, "augment.local_size")


def mask_errors(node: Mapping[str, Any], grid: PatchGrid) -> list[str]:
    """Why the masker of a `mask` node cannot be built on this grid; each sentence starts with the key to change."""
    signature, name = signatures.read(node["_target_"]), signatures.traits(node["_target_"]).get("faults")
    if signature is None or name is None:
        return []
    return _function(name)(grid, **{key: value for key, value in node.items() if key in signature.parameters})


def _mask(view: ConfigView) -> Iterator[str]:
    sizes, patches = pair_of(view["image_size"]), pair_of(view["encoder.patch_size"])
    if sizes is None or patches is None or sizes[0] < patches[0] or sizes[1] < patches[1]:
        return
    steps = view["num_frames"] // max(1, view.get("encoder.tubelet_size", 1))
    grid = PatchGrid(max(1, steps), sizes[0] // patches[0], sizes[1] // patches[1])
    node = {key.removeprefix("mask."): value for key, value in view.items() if key.startswith("mask.")}
    node |= {key: value for key, value in view.config["mask"].items() if value is None}
    for error in mask_errors(node, grid):
        name = error.partition("=")[0]
        reason = error.removeprefix(f"{name}={find(node, name)} ")
        keys, tokens = ("image_size", "encoder.patch_size"), f", {show_grid(grid)} tokens"
        if name == "horizon":
            keys, tokens = ("num_frames", "encoder.tubelet_size"), ""
        sizes_text = f" with {' and '.join(view.describe(key) for key in keys if key in view)}{tokens}"
        yield f"{view.describe(f'mask.{name}')}{'' if reason.startswith('must') else sizes_text}: {reason}"


def _warmup(view: ConfigView) -> Iterator[str]:
    epochs, steps = "schedule.warmup_epochs", view.get("steps")
    if epochs not in view:
        if view["schedule.warmup_ratio"] >= 1:
            yield f"{view.describe('schedule.warmup_ratio')}: a warm-up as long as the run; it must be below 1"
    elif steps is None and view[epochs] >= view["epochs"]:
        yield f"{view.describe(epochs, 'epochs')}: the warm-up must be shorter than the run"
    elif steps is not None and "dataset.num_samples" in view:
        warmup = round(view[epochs] * (view["dataset.num_samples"] // view["batch_size"]))
        if warmup >= steps:
            yield f"{view.describe(epochs, 'steps')}: a warm-up of {warmup} steps, the run must be longer"


def _batch(view: ConfigView) -> Iterator[str]:
    """Of a training; the batch size of an evaluation may exceed the data set."""
    if "epochs" not in view:
        return
    size, micro = view["batch_size"], view.get("micro_batch_size")
    if micro and micro > 0 and size % micro:
        yield f"{view.describe('micro_batch_size', 'batch_size')}: {micro} does not divide {size}"
    if view.get("dataset.num_samples", size) < size:
        yield f"{view.describe('batch_size', 'dataset.num_samples')}: the data set is smaller than one batch"


def _hardware(view: ConfigView) -> Iterator[str]:
    """`estimate=true` gives every GPU an equal share of the batch."""
    if (gpu := view.get("hardware.gpu", next(iter(GPUS)))) not in GPUS:
        yield f"{view.describe('hardware.gpu')}: no such gpu{suggestion(gpu, GPUS)}; valid: {', '.join(GPUS)}"
    if view.get("estimate"):
        yield from _equal_shares(view, "hardware.count")


def _processes(view: ConfigView) -> Iterator[str]:
    count = view.get("processes") or 1
    if count > 1 and view.get("strategy") == "single":
        yield f"{view.describe('strategy', 'processes')}: use strategy=ddp or fsdp"
    if count > 1 and str(view.get("device", "")).startswith("cuda:"):
        yield f"{view.describe('device', 'processes')}: each has a GPU of its own; use device=cuda"
    if view.get("device") == "mps" and (count > 1 or view.get("strategy") == "fsdp"):
        yield f"{view.describe('device')}: an Apple GPU is used by one process; leave processes= and strategy= out"
    if not view.get("estimate"):
        yield from _equal_shares(view, "processes")


def _equal_shares(view: ConfigView, key: str) -> Iterator[str]:
    size, count = view["batch_size"], view.get(key) or 1
    if count >= 1 and size % count:
        yield f"{view.describe(key, 'batch_size')}: equal shares need {near_multiples(size, count)}"


def _phases(view: ConfigView) -> Iterator[str]:
    """Phases have shares that sum to 1, and each has sizes that a run could have."""
    phases = view["phases"]
    errors_of_run = set(_apply(SIZE_RULES, view))
    for number, phase in enumerate(phases):
        yield from (f"phases[{number}]: {error}" for error in _phase(view, phase) if error not in errors_of_run)
    shares = [phase["share"] for phase in phases if isinstance(phase, Mapping) and _is_share(phase.get("share"))]
    if phases and len(shares) == len(phases) and abs(sum(shares) - 1) > 1e-6:
        yield f"{view.describe('phases')}: the shares sum to {sum(shares):.6g}, not to 1"


def _phase(view: ConfigView, phase: Any) -> Iterator[str]:
    if not isinstance(phase, Mapping):
        yield f"{show_value(phase)} is no phase; its keys: {', '.join(PHASE_KEYS)}"
        return
    for key in [key for key in phase if key not in PHASE_KEYS]:
        valid = f"{suggestion(key, PHASE_KEYS)}; valid: {', '.join(PHASE_KEYS)}"
        yield f"{key}={show_value(phase[key])}: a phase has no such key{valid}"
    if not _is_share(phase.get("share")):
        yield f"share={show_value(phase.get('share'))}: must be a number above 0, the share of the steps of the run"
    sizes = {key: value for key, value in phase.items() if key in PHASE_KEYS[1:]}
    wrong = [key for key, value in sizes.items() if not _is_phase_size(key, value)]
    for key in wrong:
        alternative = ", or [height, width]" if key == "image_size" else ""
        yield f"{key}={show_value(sizes.pop(key))}: must be a whole number of at least 1{alternative}"
    yield from _apply(SIZE_RULES, view.with_values(sizes))


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _is_phase_size(key: str, value: Any) -> bool:
    if value is None:
        return key == "micro_batch_size"
    return pair_of(value) is not None and (key == "image_size" or not isinstance(value, list))


def _apply(rules: Iterable[Rule], view: ConfigView) -> Iterator[str]:
    for rule in rules:
        try:
            yield from rule(view)
        except MissingValue:
            continue
        except OSError as error:
            yield explain(error)


def rule_errors(view: ConfigView) -> list[str]:
    """A message for every broken rule, each once."""
    return list(dict.fromkeys(_apply(RULES, view)))


SIZE_RULES: tuple[Rule, ...] = (
    *(
        partial(_whole_patches, key="image_size"),
        _stem,
        _frames,
        _images_only,
        _mask,
        _local_views,
        _components,
        _batch,
    ),
)
"""Rules that the sizes of a phase can break."""
RULES: tuple[Rule, ...] = (
    *(_words, _heads, _weights, _decoder, _hardware, _processes, *SIZE_RULES),
    *(_phases, _warmup, _fields, _colours, *EVAL_RULES, *EXPORT_RULES, *COLLECT_RULES, *PLAN_RULES, *RL_RULES),
    *USE_RULES,
)
