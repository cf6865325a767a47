"""Nodes of encoders in files, checked before anything is built: they name a class of this folder and its arguments."""

from __future__ import annotations

import inspect
import math
import pkgutil
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from jepa.config import signatures
from jepa.config.files import as_mapping
from jepa.config.paths import CLIP_SHAPE
from jepa.layers.shapes import ShapesOnly, fake_init
from jepa.layers.tokens import as_pair
from jepa.runs.checkpoint import CheckpointError

MAX_POSITION_BYTES = 1 << 30
"""Largest size of a table of positions, in bytes."""
_BUILD_ERRORS = (ValueError, TypeError, RuntimeError, LookupError, AttributeError, ArithmeticError)
"""Exceptions of constructors for impossible sizes."""


def check_node(node: Any, source: Path) -> dict[str, Any]:
    """The node, if it names an encoder class of this folder with arguments of the types that its constructor takes.

    Raises CheckpointError otherwise. Names in a file are looked up in this folder and never imported.
    """
    target = node.get("_target_") if isinstance(node, Mapping) else None
    kind, where = encoder_class(str(target)), f"{source}: encoder"
    if kind is None:
        raise CheckpointError(
            f"{source}: encoder {target!s:.100} is not one of jepa.encoders, and a file may not name code to run. "
            "Resume a run with an encoder of your own by the command that began it; in Python, build that encoder and "
            "read its tensors with jepa.runs.checkpoint.load_model"
        )
    parameters = signatures.read(str(target)).parameters  # pyright: ignore[reportOptionalMemberAccess]
    if unknown := sorted(map(str, node.keys() - parameters.keys() - {"_target_"})):
        raise CheckpointError(f"{where}: {kind.__name__} takes no {unknown[0]}")
    types = {name: parameter.type for name, parameter in parameters.items() if parameter.is_required or name in node}
    as_mapping(node, where, types | {"clip_shape": CLIP_SHAPE})
    if node.get("folder") is not None:
        raise CheckpointError(f"{where}: names a folder of weights; those in the file itself are read")
    if "architecture" in node:
        check_timm(node["architecture"], node.get("arguments") or {}, where)
    return dict(node)


def check_timm(architecture: str, arguments: Mapping[str, Any], where: object) -> None:
    """Refuse all but the name of a model in timm's own list, and plain values for the trunk's constructor."""
    if not timm.is_model(architecture):
        raise CheckpointError(f"{where}: timm {timm.__version__} has no model {architecture[:100]!r}")
    parameters = {name for kind in (VisionTransformer, Eva) for name in inspect.signature(kind).parameters}
    for name, value in arguments.items():
        values = value if isinstance(value, list | tuple) else [value]
        if name not in parameters or not all(isinstance(item, str | int | float | None) for item in values):
            raise CheckpointError(
                f"{where}: {name} is no argument of a Vision Transformer of timm that a file may give"
            )


@cache
def encoder_class(target: str) -> type[nn.Module] | None:
    """The class of a dotted name, if it is an nn.Module that is defined in a file of this folder."""
    parts = re.fullmatch(r"jepa\.encoders\.(\w+)\.(\w+)", target)
    if parts is None or parts[1] not in {module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)])}:
        return None
    module = import_module(f"jepa.encoders.{parts[1]}")
    kind = vars(module).get(parts[2])
    is_encoder = isinstance(kind, type) and issubclass(kind, nn.Module) and kind.__module__ == module.__name__
    return kind if is_encoder else None


def build(node: Mapping[str, Any]) -> Any:
    """The encoder of a checked node, whose values are passed as they are."""
    kind = encoder_class(node["_target_"])
    assert kind is not None
    return kind(**{name: value for name, value in node.items() if name != "_target_"})


def outline(node: Mapping[str, Any], tensors: Mapping[str, Tensor], source: object, *, any_clip: bool = False) -> Any:
    """The encoder of a checked node with fake tensors, whose weights have the names and shapes of `tensors`.

    Raises CheckpointError if they differ, so that the real encoder takes no more memory than the tensors. With
    `any_clip` the encoder will be built for clips of another shape, and that of the node need not fit.
    """
    depths = (node.get("depth"), (node.get("arguments") or {}).get("depth"))
    if any(isinstance(depth, int) and depth > len(tensors) for depth in depths):
        raise CheckpointError(f"{source} does not fit the encoder that it describes: it lacks blocks")
    try:
        with _disable_current_modes(), torch.random.fork_rng(devices=[]), fake_init(ShapesOnly()):
            encoder = build(_one_patch(node) if any_clip else node)
    except _BUILD_ERRORS as error:
        raise CheckpointError(f"{source}: {' '.join(str(error).split())[:240]}") from error
    check_tensors(encoder.state_dict(), tensors, source)
    tables = sum(buffer.nbytes for buffer in encoder.buffers()) - sum(tensor.nbytes for tensor in tensors.values())
    if tables > MAX_POSITION_BYTES:
        raise CheckpointError(f"{source}: clips of {node['clip_shape']} need {tables:,} bytes of positions")
    return encoder


def tensor_sizes(path: Path) -> list[int]:
    """The number of elements of each tensor of a safetensors file, from its header."""
    try:
        with safe_open(path, framework="pt") as file:
            return [math.prod(file.get_slice(name).get_shape()) for name in file.keys()]  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged ({error})") from error


def _one_patch(node: Mapping[str, Any]) -> Mapping[str, Any]:
    """The node for clips of one patch, unless the shape of a weight depends on the clips."""
    if "patch_size" not in node or node.get("position") == "table":
        return node
    patch = (node.get("tubelet_size", 2), *as_pair(node["patch_size"]))
    return {**node, "clip_shape": [node["clip_shape"][0], *patch]}


def check_tensors(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: object) -> None:
    """Raises CheckpointError if names or shapes are not those of the encoder."""
    check_names(source, missing=own.keys() - tensors.keys(), unexpected=tensors.keys() - own.keys())
    differing = [name for name, tensor in own.items() if tensor.shape != tensors[name].shape]
    if differing:
        shapes = ", ".join(f"{n} {list(tensors[n].shape)} instead of {list(own[n].shape)}" for n in differing[:3])
        raise CheckpointError(f"{source} does not fit the encoder that it describes: {shapes}")


def check_names(source: Any, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    missing, unexpected = sorted(missing), sorted(unexpected)
    if missing:
        raise CheckpointError(f"{source} lacks {first_names(missing)}")
    if unexpected:
        raise CheckpointError(f"{source} is of another architecture: it also has {first_names(unexpected)}")


def first_names(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
