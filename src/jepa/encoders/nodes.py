"""Nodes of encoders as files hold them: data that names a class of this folder, checked before anything is built."""

from __future__ import annotations

import ast
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
from jepa.layers.tokens import patch_pair
from jepa.runs.checkpoint import CheckpointError

MAX_POSITION_BYTES = 1 << 30
"""Size in bytes of the largest table of positions that follows from sizes in a file."""
_FAULTS = (ValueError, TypeError, RuntimeError, LookupError, AttributeError, ArithmeticError)
"""What constructors raise at sizes that no encoder has."""


def check_node(node: Any, source: Path) -> dict[str, Any]:
    """The node, if it names an encoder class of this folder with arguments of the types that its constructor takes.

    Raises CheckpointError otherwise: what a file names is looked up in this folder and never imported.
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
    if foreign := sorted(map(str, node.keys() - parameters.keys() - {"_target_"})):
        raise CheckpointError(f"{where}: {kind.__name__} takes no {foreign[0]}")
    known = {name: one.annotation for name, one in parameters.items() if one.is_required or name in node}
    annotations = {name: ast.unparse(annotation) for name, annotation in known.items() if annotation}
    as_mapping(node, where, annotations | {"clip_shape": CLIP_SHAPE})
    if node.get("folder") is not None:
        raise CheckpointError(f"{where}: names a folder of weights; those in the file itself are read")
    if "architecture" in node:
        check_timm(node["architecture"], node.get("arguments") or {}, where)
    return dict(node)


def check_timm(architecture: str, arguments: Mapping[str, Any], where: object) -> None:
    """Refuse all but the name of a model in timm's own list, and plain values for the trunk's constructor."""
    if not timm.is_model(architecture):
        raise CheckpointError(f"{where}: timm {timm.__version__} has no model {architecture[:100]!r}")
    known = {name for kind in (VisionTransformer, Eva) for name in inspect.signature(kind).parameters}
    for name, value in arguments.items():
        values = value if isinstance(value, list | tuple) else [value]
        if name not in known or any(not isinstance(one, str | int | float | None) for one in values):
            raise CheckpointError(
                f"{where}: {name} is no argument of a Vision Transformer of timm that a file may give"
            )


@cache
def encoder_class(target: str) -> type[nn.Module] | None:
    """The class that a dotted name stands for, if it is an nn.Module defined in a file of this folder."""
    parts = re.fullmatch(r"jepa\.encoders\.(\w+)\.(\w+)", target)
    if parts is None or parts[1] not in {module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)])}:
        return None
    module = import_module(f"jepa.encoders.{parts[1]}")
    found = vars(module).get(parts[2])
    is_ours = isinstance(found, type) and issubclass(found, nn.Module) and found.__module__ == module.__name__
    return found if is_ours else None


def build(node: Mapping[str, Any]) -> Any:
    """The encoder of a checked node; nothing in its values is looked up or resolved."""
    kind = encoder_class(node["_target_"])
    assert kind is not None
    return kind(**{name: value for name, value in node.items() if name != "_target_"})


def outline(node: Mapping[str, Any], tensors: Mapping[str, Tensor], source: object, *, any_clip: bool = False) -> Any:
    """The encoder of a checked node as sizes without numbers, whose weights have the names and shapes of `tensors`.

    Raises CheckpointError where they differ: building it for real will take no more memory than the tensors do. With
    `any_clip` the clips will be others than those of the node, which need not fit.
    """
    depths = (node.get("depth"), (node.get("arguments") or {}).get("depth"))
    if any(isinstance(depth, int) and depth > len(tensors) for depth in depths):
        raise CheckpointError(f"{source} does not fit the encoder that it describes: it lacks blocks")
    try:
        with _disable_current_modes(), torch.random.fork_rng(devices=[]), fake_init(ShapesOnly()):
            encoder = build(_one_patch(node) if any_clip else node)
    except _FAULTS as error:
        raise CheckpointError(f"{source}: {' '.join(str(error).split())[:240]}") from error
    check_tensors(encoder.state_dict(), tensors, source)
    tables = sum(buffer.nbytes for buffer in encoder.buffers()) - sum(tensor.nbytes for tensor in tensors.values())
    if tables > MAX_POSITION_BYTES:
        raise CheckpointError(f"{source}: clips of {node['clip_shape']} need {tables:,} bytes of positions")
    return encoder


def tensor_sizes(path: Path) -> list[int]:
    """How many numbers each tensor of a safetensors file has, by its header."""
    try:
        with safe_open(path, framework="pt") as file:
            return [math.prod(file.get_slice(name).get_shape()) for name in file.keys()]  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged ({error})") from error


def _one_patch(node: Mapping[str, Any]) -> Mapping[str, Any]:
    """The node for clips of one patch, where none of its weights depends on the clips."""
    if "patch_size" not in node or node.get("position") == "table":
        return node
    patch = (node.get("tubelet_size", 2), *patch_pair(node["patch_size"]))
    return {**node, "clip_shape": [node["clip_shape"][0], *patch]}


def check_tensors(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: object) -> None:
    """Raises CheckpointError where names or shapes are not those of the encoder."""
    check_names(source, lacking=own.keys() - tensors.keys(), foreign=tensors.keys() - own.keys())
    differing = [name for name, tensor in own.items() if tensor.shape != tensors[name].shape]
    if differing:
        shapes = ", ".join(f"{n} {list(tensors[n].shape)} instead of {list(own[n].shape)}" for n in differing[:3])
        raise CheckpointError(f"{source} does not fit the encoder that it describes: {shapes}")


def check_names(source: Any, lacking: Iterable[str], foreign: Iterable[str]) -> None:
    lacking, foreign = sorted(lacking), sorted(foreign)
    if lacking:
        raise CheckpointError(f"{source} lacks {first_names(lacking)}")
    if foreign:
        raise CheckpointError(f"{source} is of another architecture: it also has {first_names(foreign)}")


def first_names(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
