"""What must hold between the keys of a configuration, one rule for each connection. Without torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from jepa.config import signatures
from jepa.config.catalogue import Catalogue, conf_folder, find
from jepa.config.command_rules import OF_EVAL, OF_EXPORTS
from jepa.config.paths import find_source
from jepa.config.schema import show_value
from jepa.config.view import ConfigView, MissingValue, Rule, hides_tokens, not_divisible, pair_of
from jepa.masks.geometry import show_grid
from jepa.resources.hardware import GPUS
from jepa.suggestions import near_multiples, suggestion
from jepa.types import PatchGrid

PHASE_KEYS = ("share", "image_size", "num_frames", "micro_batch_size")


def _words(checked: ConfigView) -> Iterator[str]:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", checked.get("device", "auto")):
        yield f"{checked.show('device')}: no such device; valid: auto, cpu, cuda, cuda:0, cuda:1 ..."
    if not re.fullmatch(r"[\w*?-]+/[\w*?-]+", checked.get("evaluation.judge", "probe/*")):
        yield f"{checked.show('evaluation.judge')}: metrics have names with a slash, as probe/knn_top1, predict/gain"
    name = str(checked.get("name", "-"))
    if not name or Path(name).is_absolute() or ".." in Path(name).parts:
        yield f"{checked.show('name')}: names a folder below outputs/, so no absolute path and no '..'"


def _image_size(checked: ConfigView) -> Iterator[str]:
    sizes = pair_of(checked["image_size"])
    if sizes is None:
        yield f"{checked.show('image_size')}: takes a number of pixels, or [height, width]"
        return
    patches = pair_of(checked["encoder.patch_size"])
    if patches is None:
        yield f"{checked.show('encoder.patch_size')}: takes a number of pixels, or [height, width]"
        return
    for size, patch in dict.fromkeys(zip(sizes, patches, strict=True)):
        yield from not_divisible(checked, "image_size", size, "encoder.patch_size", patch)


def _frames(checked: ConfigView) -> Iterator[str]:
    """A single frame is an image, which the encoder repeats to fill a tubelet."""
    if checked["num_frames"] > 1:
        tubelet = checked["encoder.tubelet_size"]
        yield from not_divisible(checked, "num_frames", checked["num_frames"], "encoder.tubelet_size", tubelet)


def _images_only(checked: ConfigView) -> Iterator[str]:
    """The constructor of a data set of clips takes `num_frames`."""
    try:
        signature = signatures.read(checked["dataset._target_"]) if checked["num_frames"] > 1 else None
    except LookupError:
        return
    if signature is not None and not signature.takes_more and "num_frames" not in signature.parameters:
        yield f"{checked.show('num_frames')}: {signature.name} delivers images: num_frames=1"


def _heads(checked: ConfigView) -> Iterator[str]:
    found = list(_divides(checked, "encoder.num_heads", "encoder.embed_dim"))
    yield from found
    if "predictor.num_heads" in checked:
        yield from _divides(checked, "predictor.num_heads", "predictor.width")
    elif not found:
        yield from _divides(checked, "encoder.num_heads", "predictor.width")


def _divides(checked: ConfigView, heads_key: str, width_key: str) -> Iterator[str]:
    if heads_key not in checked or width_key not in checked:
        return
    heads, width, section = checked[heads_key], checked[width_key], width_key.partition(".")[0]
    position = checked.get(f"{section}.position", "sincos")
    if heads > 0 and width % heads:
        both = f"{checked.show(width_key)} with {checked.show(heads_key)}"
        valid = [n for n in range(1, 65) if width % n == 0]
        near = sorted(sorted(valid, key=lambda n: abs(n - heads))[:2])
        yield f"{both}: {heads} heads do not divide a width of {width}; nearest: {', '.join(map(str, near))} heads"
    elif position in ("sincos", "table") and width % 4:
        yield f"{checked.show(width_key)}: sin-cos positions need a width divisible by 4"
    elif position in ("rope", "vjepa2") and heads > 0 and (width // heads < 6 or width // heads % 2):
        keys = f"{checked.show(f'{section}.position')} with {checked.show(width_key)} and {checked.show(heads_key)}"
        yield f"{keys}: rotary positions need heads of an even width of at least 6, not {width // heads}"


def _weights(checked: ConfigView) -> Iterator[str]:
    """What an encoder is to begin with is there, as far as a look at names and small files tells."""
    try:
        find_source(checked["encoder.weights"])
    except ValueError as fault:
        yield f"{checked.show('encoder.weights')}: {fault}"


def _decoder(checked: ConfigView) -> Iterator[str]:
    """The decoder of pixels takes half the encoder's width and its heads where nothing else is said."""
    if "objective.decoder_depth" not in checked:
        return
    width = checked.get("objective.decoder_width", checked["encoder.embed_dim"] // 2)
    heads = checked.get("objective.decoder_num_heads", checked["encoder.num_heads"])
    if min(width, heads) >= 1 and (width % heads or width % 4):
        shown = " with ".join(checked.show(f"objective.decoder_{key}") for key in ("width", "num_heads"))
        yield f"{shown}: a decoder of width {width} and {heads} heads: 4 and the heads must divide the width"


def _components(checked: ConfigView) -> Iterator[str]:
    """What a component's class names as its `rules`: functions of the view and of the component's section."""
    for path, node in components(checked.config):
        for name in signatures.traits(str(node["_target_"])).get("rules", ()):
            module, _, function = name.rpartition(".")
            yield from _apply([partial(getattr(import_module(module), function), path=path)], checked)


def components(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every node with a `_target_` under its dotted key, also inside other nodes."""
    for key, node in values.items():
        if isinstance(node, Mapping):
            if "_target_" in node:
                yield f"{prefix}{key}", node
            yield from components(node, f"{prefix}{key}.")


def _fields(checked: ConfigView) -> Iterator[str]:
    """A data set has what the objective `needs`; one that is not ours and says nothing is believed to."""
    target, objective = checked["dataset._target_"], checked["objective._target_"]
    fields = signatures.traits(target).get("fields", () if target.startswith("jepa.") else None)
    for field in sorted({*signatures.traits(objective).get("needs", ())} - {"labels"}):
        if fields is not None and field not in fields:
            learner, data = (name.rpartition(".")[2] for name in (objective, target))
            lacks = f"{learner} learns from {field}, and {data} has none"
            yield f"{checked.show('objective')}: {lacks}; {_datasets_with(field)}"


def _datasets_with(field: str) -> str:
    """Which choices of conf/dataset have a field."""
    choices = Catalogue([conf_folder()]).groups["dataset"].values()
    targets = {choice.name: choice.values.get("dataset._target_", "") for choice in choices}
    names = [name for name, target in targets.items() if field in signatures.traits(target).get("fields", ())]
    return f"choose dataset={' or '.join(names)}" if names else "a data set declares it in its `fields`"


def _colours(checked: ConfigView) -> Iterator[str]:
    if checked.get("augment.grayscale", 0) > 0 and checked.get("dataset.channels", 3) != 3:
        yield f"{checked.show('augment.grayscale')}: the pictures are grey already; set it to 0"


def _local(checked: ConfigView) -> Iterator[str]:
    """Smaller crops are cut into patches, and compared with the whole of the others."""
    if checked["augment.local_views"] < 1:
        return
    shown = checked.show("augment.local_views")
    if hides_tokens(checked):
        masker = checked["mask._target_"].rpartition(".")[2]
        yield f"{shown} with {masker}: smaller crops are compared with whole views, of which none is masked; mask=none"
    elif not checked.config.get("regularizer"):
        yield f"{shown} without a regularizer: nothing compares the crops; regularizer=[cross_view,sigreg]"
    if "augment.local_size" in checked:
        sizes = pair_of(checked["augment.local_size"])
        if sizes is None:
            yield f"{checked.show('augment.local_size')}: takes a number of pixels, or [height, width]"
            return
        patches = pair_of(checked["encoder.patch_size"]) or sizes
        for size, patch in dict.fromkeys(zip(sizes, patches, strict=True)):
            yield from not_divisible(checked, "augment.local_size", size, "encoder.patch_size", patch)


def mask_faults(node: Mapping[str, Any], grid: PatchGrid) -> list[str]:
    """Why the masker of a `mask` node cannot be built on this grid, each sentence beginning with the key at fault."""
    signature, name = signatures.read(node["_target_"]), signatures.traits(node["_target_"]).get("faults")
    if signature is None or name is None:
        return []
    module, _, function = name.rpartition(".")
    values = {key: value for key, value in node.items() if key in signature.parameters}
    return getattr(import_module(module), function)(grid, **values)


def _mask(checked: ConfigView) -> Iterator[str]:
    sizes, patches = pair_of(checked["image_size"]), pair_of(checked["encoder.patch_size"])
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


def _warmup(checked: ConfigView) -> Iterator[str]:
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


def _batch(checked: ConfigView) -> Iterator[str]:
    """Of a training: that of an evaluation is no more than how many samples are encoded at once."""
    if "epochs" not in checked:
        return
    whole, part = checked["batch_size"], checked.get("micro_batch_size")
    if part and part > 0 and whole % part:
        both = f"{checked.show('micro_batch_size')} with {checked.show('batch_size')}"
        yield f"{both}: {part} does not divide {whole}"
    samples = checked.get("dataset.num_samples", whole)
    if samples < whole:
        both = f"{checked.show('batch_size')} with {checked.show('dataset.num_samples')}"
        yield f"{both}: the data set is smaller than one batch"


def _hardware(checked: ConfigView) -> Iterator[str]:
    """`estimate=true` gives every GPU an equal share of the batch."""
    if (gpu := checked.get("hardware.gpu", next(iter(GPUS)))) not in GPUS:
        yield f"{checked.show('hardware.gpu')}: no such gpu{suggestion(gpu, GPUS)}; valid: {', '.join(GPUS)}"
    if checked.get("estimate"):
        yield from _equal_shares(checked, "hardware.count")


def _processes(checked: ConfigView) -> Iterator[str]:
    count = checked.get("processes") or 1
    if count > 1 and checked.get("strategy") == "single":
        yield f"{checked.show('strategy')} with {checked.show('processes')}: use strategy=ddp or fsdp"
    if count > 1 and str(checked.get("device", "")).startswith("cuda:"):
        yield f"{checked.show('device')} with {checked.show('processes')}: each has a GPU of its own; use device=cuda"
    if not checked.get("estimate"):
        yield from _equal_shares(checked, "processes")


def _equal_shares(checked: ConfigView, key: str) -> Iterator[str]:
    size, count = checked["batch_size"], checked.get(key) or 1
    if count >= 1 and size % count:
        yield f"{checked.show(key)} with {checked.show('batch_size')}: equal shares need {near_multiples(size, count)}"


def _phases(checked: ConfigView) -> Iterator[str]:
    """Phases have shares that sum to 1, and each has sizes that a run could have."""
    phases = checked["phases"]
    known = set(_apply(OF_SIZES, checked))
    for number, phase in enumerate(phases):
        yield from (f"phases[{number}]: {fault}" for fault in _phase(checked, phase) if fault not in known)
    shares = [phase["share"] for phase in phases if isinstance(phase, Mapping) and _is_share(phase.get("share"))]
    if phases and len(shares) == len(phases) and abs(sum(shares) - 1) > 1e-6:
        yield f"{checked.show('phases')}: the shares sum to {sum(shares):.6g}, not to 1"


def _phase(checked: ConfigView, phase: Any) -> Iterator[str]:
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
        if (key == "image_size" and pair_of(value) is None)
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


def _apply(rules: Iterable[Rule], checked: ConfigView) -> Iterator[str]:
    for rule in rules:
        with suppress(MissingValue):
            yield from rule(checked)


def faults_between(checked: ConfigView) -> list[str]:
    """Every rule that is broken, one sentence each."""
    return list(_apply(RULES, checked))


OF_SIZES: tuple[Rule, ...] = (_image_size, _frames, _images_only, _mask, _local, _components, _batch)
"""Rules that a phase of other sizes can break."""
RULES: tuple[Rule, ...] = (
    _words,
    _heads,
    _weights,
    _decoder,
    _hardware,
    _processes,
    *OF_SIZES,
    _phases,
    _warmup,
    _fields,
    _colours,
    *OF_EVAL,
    *OF_EXPORTS,
)
