"""Reads encoders that others have trained, and translates them into a configuration and tensors of ours.

Nothing is run that a file names: pickles are read with `weights_only`, the rest is JSON and safetensors.
"""

from __future__ import annotations

import json
import math
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from jepa.config.files import Fields, as_mapping, read_json
from jepa.config.paths import CLIP_SHAPE, ENCODER_FORMAT, EXPECTED, OF_TRANSFORMERS, Source, find_source
from jepa.data.images import NATURAL
from jepa.data.loader import first_line
from jepa.encoders.names import (
    IJEPA,
    PUBLISHED,
    TABLE,
    VJEPA2,
    Names,
    block_prefix,
    count_blocks,
    from_foreign,
    name_pairs,
)
from jepa.encoders.nodes import check_names, check_node, check_tensors, first_names
from jepa.runs import checkpoint
from jepa.runs.checkpoint import CheckpointError
from jepa.runs.metrics import read_config

SPATIAL, TEMPORAL = "jepa.encoders.spatial.SpatialEncoder", "jepa.encoders.temporal.TemporalEncoder"
NUM_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16, 1664: 16}
"""Width of a published encoder -> heads of its attention, which its file does not tell."""
NUM_HEADS_ROTARY = NUM_HEADS | {1408: 22, 1664: 26}
"""Of V-JEPA 2, whose giant encoder has narrower heads."""
ROTARY_CLIP = (16, 256, 256)
"""Frames, height and width of a clip of V-JEPA 2, which neither weights nor positions tell."""
OF_PIXELS: Fields = {"mean": "Sequence[float]", "std": "Sequence[float]"}
OF_PREPROCESSOR: Fields = dict.fromkeys(("image_mean", "image_std"), "Sequence[float] | None")
NUM_MASK_TOKENS = 2
"""Of a predictor of V-JEPA; that of V-JEPA 2 has more, and its files hold a table of positions that nothing reads."""

_FAULTS = (RuntimeError, EOFError, OSError, ValueError, LookupError, AttributeError, TypeError, ArithmeticError)
_FAULTS += (AssertionError, MemoryError, struct.error, zipfile.BadZipFile)
"""What torch raises at pickles that it has not written."""


class Weights(NamedTuple):
    node: dict[str, Any]
    """Builds the bare encoder, `clip_shape` included."""
    tensors: dict[str, Tensor]
    """By our names."""
    mean: Sequence[float]
    std: Sequence[float]


@checkpoint.as_checkpoint_errors()
def read_weights(source: Source, *, num_heads: int | None = None) -> Weights:
    """The encoder of a source of any kind but timm's. `num_heads` stands in where a published width is not known.

    Raises CheckpointError, naming the source, for what is damaged, of another architecture or no encoder at all.
    """
    if source.kind == "hub":
        folder = download(source.place)
        source = _found(str(folder), f"{source}: ")
    readers: dict[str, Callable[[Path], Weights]] = {
        "run": _read_run,
        "exported": _read_exported,
        "transformers": _read_transformers,
    }
    path = Path(source.place)
    weights = readers[source.kind](path) if source.kind in readers else _read_file(path, num_heads)
    channels = weights.node["clip_shape"][0]
    if {channels} != {len(weights.mean), len(weights.std)}:
        raise CheckpointError(f"{source}: mean and std of its pixels are not of {channels} channels")
    return weights


def write_encoder(folder: Path, encoder: Any) -> None:
    """config.json and model.safetensors, which `read_weights` reads; `encoder` is what `open_encoder` gives."""
    normalise = encoder.transform.normalise
    config = {"format": ENCODER_FORMAT, "encoder": encoder.node, "mean": normalise.mean, "std": normalise.std}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    save_file(
        {name: tensor.contiguous() for name, tensor in encoder.state_dict().items()}, folder / "model.safetensors"
    )


def load_exact(encoder: nn.Module, tensors: Mapping[str, Tensor], source: Source) -> None:
    """Load the tensors; CheckpointError where names or shapes are not those of the encoder."""
    check_tensors(encoder.state_dict(), tensors, source)
    encoder.load_state_dict(dict(tensors))


def _read_run(path: Path) -> Weights:
    """The encoder of a run folder or a checkpoint; what was trained before checkpoints named it is in its config."""
    found = checkpoint.find(path)
    state = checkpoint.read_state(found)
    as_mapping(state, found / "state.json", {"backbone": "str", "clip_shape": CLIP_SHAPE, **OF_PIXELS})
    config = {} if state.get("encoder") else read_config(found, {"encoder": "dict"})
    node = state.get("encoder") or config["encoder"] | {"clip_shape": state["clip_shape"]}
    tensors = checkpoint.load_model(found, state["backbone"] + ".")
    return Weights(check_node(node, found), tensors, state["mean"], state["std"])


def _read_exported(path: Path) -> Weights:
    config = read_json(path / "config.json", {"encoder": "dict", **OF_PIXELS})
    return Weights(check_node(config["encoder"], path), _safetensors(path), config["mean"], config["std"])


def _read_transformers(path: Path) -> Weights:
    """A folder of transformers; where config.json is silent, the defaults of IJepaConfig and VJEPA2Config hold."""
    stored, tensors = read_json(path / "config.json", OF_TRANSFORMERS), _safetensors(path)
    config = {name: value for name, value in stored.items() if value is not None}
    kind = config["model_type"]
    if (act := config.get("hidden_act", "gelu")) != "gelu":
        raise CheckpointError(f"{path}: hidden_act={act}; this trunk has the exact gelu alone")
    tensors = {name.removeprefix(f"{kind}."): tensor for name, tensor in tensors.items()}  # inside a classifier
    names, others = {
        "ijepa": (IJEPA, ("pooler.", "classifier.", "embeddings.mask_token")),
        "vjepa2": (VJEPA2, ("predictor.", "pooler.", "classifier.")),
    }[kind]
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(others)}
    if config.get("qkv_bias") is False:
        tensors |= _zero_biases(tensors, names)
    ours, sizes = _translate(tensors, names, path, needs_table=kind == "ijepa")
    sizes |= {"norm_eps": config.get("layer_norm_eps", 1e-12 if kind == "ijepa" else 1e-6)}
    heads, channels = config.get("num_attention_heads", 12 if kind == "ijepa" else 16), sizes.pop("channels")
    if kind == "ijepa":
        size = config.get("image_size", 224)
        height, width = (size, size) if isinstance(size, int) else size
        node = {"_target_": SPATIAL, "clip_shape": [channels, 1, height, width], "position": "table"}
    else:
        clip = [channels, config.get("frames_per_clip", 64), *[config.get("crop_size", 256)] * 2]
        node = {"_target_": TEMPORAL, "clip_shape": clip, "position": "vjepa2"}
    return Weights(node | sizes | {"num_heads": heads}, ours, *_colours(path, channels))


def _read_file(path: Path, num_heads: int | None) -> Weights:
    """A file that I-JEPA, V-JEPA or V-JEPA 2 has saved; of images where patches have no depth in time."""
    stored = _unpickle(path)
    tensors = _encoder_in(stored, path)
    patch = tensors.get("patch_embed.proj.weight")
    if patch is None or patch.ndim not in (4, 5):
        raise CheckpointError(f"{path} holds no encoder of I-JEPA or V-JEPA: it lacks patch_embed.proj.weight")
    is_rotary = patch.ndim == 5 and ("pos_embed" not in tensors or _has_rotary_predictor(stored))
    if is_rotary:
        tensors.pop("pos_embed", None)
    ours, sizes = _translate(tensors, PUBLISHED, path, needs_table=not is_rotary)
    width, channels = sizes["embed_dim"], sizes.pop("channels")
    known = NUM_HEADS_ROTARY if is_rotary else NUM_HEADS
    if (heads := num_heads or known.get(width)) is None:
        raise CheckpointError(
            f"{path}: a width of {width} is of no published encoder, and the file does not tell the heads of its "
            "attention; give encoder.attention_heads"
        )
    if is_rotary:
        grid, clip = None, list(ROTARY_CLIP)
    else:
        grid = _square_grid(ours[TABLE], patch.ndim == 5, path)
        clip = [
            grid[0] * sizes.get("tubelet_size", 1),
            *(n * p for n, p in zip(grid[1:], sizes["patch_size"], strict=True)),
        ]
    node = {
        "_target_": SPATIAL if patch.ndim == 4 else TEMPORAL,
        "clip_shape": [channels, *clip],
        "position": "vjepa2" if is_rotary else "table",
        "num_heads": heads,
    }
    return Weights(node | sizes, ours, *_colours(path.parent, channels))


def _translate(
    tensors: Mapping[str, Tensor], names: Names, path: Path, *, needs_table: bool
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by our names, and the sizes that their shapes tell."""
    depth = count_blocks(tensors, block_prefix(names))
    wanted = {
        name for ours, theirs in name_pairs(names, max(depth, 1)) if ours != TABLE or needs_table for name in theirs
    }
    check_names(path, lacking=wanted - tensors.keys(), foreign=tensors.keys() - wanted)
    patch = tensors[f"{names['embed'][0]}.weight"]
    hidden = tensors[names["blocks.{}.mlp.fc1"][0].format(0) + ".weight"]
    table = tensors[names[TABLE][0]] if needs_table else None
    is_odd = patch.ndim not in (4, 5) or hidden.ndim != 2 or not min(*patch.shape, *hidden.shape)
    if is_odd or (table is not None and (table.ndim != 3 or table.shape[0] != 1)):
        raise _odd_shapes(path)
    width, channels, *cut = patch.shape
    ratio = len(hidden) / width
    sizes = {
        "channels": channels,
        "patch_size": list(cut[-2:]),
        **({"tubelet_size": cut[0]} if len(cut) == 3 else {}),
        "embed_dim": width,
        "depth": depth,
        "mlp_ratio": ratio if int(width * ratio) == len(hidden) else (len(hidden) + 0.5) / width,
        "norm_eps": 1e-6,
    }
    try:
        return {name: tensor.float() for name, tensor in from_foreign(tensors, names).items()}, sizes
    except (RuntimeError, IndexError) as error:
        raise _odd_shapes(path) from error


def _odd_shapes(path: Path) -> CheckpointError:
    return CheckpointError(f"{path}: its tensors have shapes that no encoder of I-JEPA or V-JEPA has")


def _zero_biases(tensors: Mapping[str, Tensor], names: Names) -> dict[str, Tensor]:
    """Query, key and value without biases are the same as with zeros."""
    lacking = [f"{name}." for ours in ("blocks.{}.attn.qkv",) for name in names[ours]]
    depth = count_blocks(tensors, block_prefix(names))
    stems = [stem.format(number) for stem in lacking for number in range(depth)]
    return {f"{stem}bias": torch.zeros(len(tensors[f"{stem}weight"])) for stem in stems if f"{stem}weight" in tensors}


def _encoder_in(stored: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """The tensors of the target encoder, else of the encoder, or the file itself where it holds tensors alone."""
    found = next((stored[key] for key in ("target_encoder", "encoder") if isinstance(stored.get(key), Mapping)), stored)
    tensors = {}
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{path} holds neither target_encoder nor encoder, but {first_names(sorted(map(str, found)))}"
            )
        if tensor.layout is not torch.strided or tensor.device.type != "cpu" or not tensor.is_floating_point():
            raise CheckpointError(f"{path}: {name} is no dense tensor of floating point numbers")
        tensors[_strip_prefix(name)] = tensor
    if (size := sum(tensor.nbytes for tensor in tensors.values())) > path.stat().st_size:
        raise CheckpointError(f"{path} is damaged: its tensors have {size:,} bytes, more than the file")
    return tensors


def _strip_prefix(name: str) -> str:
    for prefix in ("module.", "backbone."):
        name = name.removeprefix(prefix)
    return name


def _has_rotary_predictor(stored: Mapping[str, Any]) -> bool:
    predictor = stored.get("predictor")
    tokens = (
        [name for name in predictor if _strip_prefix(str(name)).startswith("mask_tokens.")]
        if isinstance(predictor, Mapping)
        else []
    )
    return len(tokens) > NUM_MASK_TOKENS


def _square_grid(table: Tensor, in_time: bool, path: Path) -> tuple[int, int, int]:
    """Steps, rows and columns of a table [N, D] of square pictures.

    A table in three dimensions tells the time first, by its sine, which is zero in the first step alone.
    """
    total = len(table)
    later = (table[:, 0] != table[0, 0]).nonzero()
    places = int(later[0]) if in_time and len(later) else total
    side = math.isqrt(places)
    if side * side != places or total % places:
        raise CheckpointError(f"{path}: {total} positions are of no square picture, others the file cannot tell")
    return total // places, side, side


def _colours(folder: Path, channels: int) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation that a preprocessor names, else those of natural images."""
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        config = read_json(folder / name, OF_PREPROCESSOR) if (folder / name).is_file() else {}
        if len(config.get("image_mean") or ()) == len(config.get("image_std") or ()) == channels:
            return config["image_mean"], config["image_std"]
    return NATURAL.get(channels, ([0.5] * channels, [0.5] * channels))


def _unpickle(path: Path) -> Mapping[str, Any]:
    try:
        is_zip = zipfile.is_zipfile(path)
        if is_zip and any(part.compress_type for part in zipfile.ZipFile(path).infolist()):
            raise CheckpointError(f"{path} is a compressed archive; {EXPECTED}")
        stored = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        if re.search("GLOBAL|instantiate", str(error)):
            raise CheckpointError(f"{path} names code to run, and is not read: expected tensors alone") from error
        raise CheckpointError(f"{path} is no checkpoint of PyTorch; {EXPECTED}") from error
    except CheckpointError:
        raise
    except _FAULTS as error:
        raise CheckpointError(f"{path} is damaged or no checkpoint of PyTorch ({first_line(error)})") from error
    if not isinstance(stored, Mapping):
        raise CheckpointError(f"{path} holds a {type(stored).__name__}, no named tensors; {EXPECTED}")
    return stored


def _safetensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors, or of the files that its index lists."""
    index = folder / "model.safetensors.index.json"
    listed = read_json(index, {"weight_map": "Mapping[str, str]"})["weight_map"].values() if index.is_file() else ()
    files = sorted(set(listed)) or ["model.safetensors"]
    tensors = {}
    for name in files:
        if Path(name).name != name or not (folder / name).is_file():
            raise CheckpointError(f"{folder} has no {name}; the weights must lie there as safetensors")
        try:
            tensors |= load_file(folder / name)
        except (SafetensorError, OSError, ValueError, LookupError, TypeError, RuntimeError) as error:
            raise CheckpointError(f"{folder / name} is damaged ({first_line(error)})") from error
    return tensors


def download(name: str) -> str:
    """The folder of a model on the hub, ORG/NAME or ORG/NAME@REVISION, with its configuration and safetensors."""
    from huggingface_hub import snapshot_download

    repository, _, revision = name.partition("@")
    try:
        return snapshot_download(repository, revision=revision or None, allow_patterns=["*.json", "*.safetensors"])
    except OSError as error:
        raise CheckpointError(f"{name} is not on this machine and cannot be fetched ({first_line(error)})") from error


def _found(text: str, prefix: str = "") -> Source:
    try:
        return find_source(text)
    except ValueError as error:
        raise CheckpointError(f"{prefix}{error}") from error
