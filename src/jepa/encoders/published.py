"""Reads encoders trained with other code, and translates them into a configuration and tensors of ours.

No code that a file names is run: pickles are read with `weights_only`, the rest is JSON and safetensors.
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
from jepa.config.paths import CLIP_SHAPE, ENCODER_FORMAT, EXPECTED, TRANSFORMERS_FIELDS, Source, find_source
from jepa.data.folders import IMAGENET_STATS
from jepa.data.loader import first_line
from jepa.encoders.names import IJEPA, PUBLISHED, TABLE, VJEPA2, Names, count_blocks, from_foreign, name_pairs
from jepa.encoders.nodes import check_names, check_node, check_tensors, first_names
from jepa.layers.tokens import as_pair
from jepa.runs import checkpoint
from jepa.runs.checkpoint import CheckpointError
from jepa.runs.metrics import read_config

SPATIAL, TEMPORAL = "jepa.encoders.spatial.SpatialEncoder", "jepa.encoders.temporal.TemporalEncoder"
NUM_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16, 1664: 16}
"""Width of a published encoder -> number of attention heads, which its file does not contain."""
NUM_HEADS_ROTARY = NUM_HEADS | {1408: 22, 1664: 26}
"""The same for V-JEPA 2, whose giant encoder has narrower heads."""
ROTARY_CLIP = (16, 256, 256)
"""Frames, height and width of a clip of V-JEPA 2, which its files do not contain."""
PIXEL_FIELDS: Fields = {"mean": Sequence[float], "std": Sequence[float]}
"""Fields of state.json and of an exported config.json."""
PREPROCESSOR_FIELDS: Fields = dict.fromkeys(("image_mean", "image_std"), Sequence[float] | None)
"""Fields of the preprocessor's configuration of transformers that are read."""
NUM_MASK_TOKENS = 2
"""Mask tokens of V-JEPA's predictor. V-JEPA 2 has more, and its files contain a table of positions that is not used."""

_PICKLE_ERRORS = (RuntimeError, EOFError, OSError, ValueError, LookupError, AttributeError, TypeError, ArithmeticError)
_PICKLE_ERRORS += (AssertionError, MemoryError, struct.error, zipfile.BadZipFile)
"""Exceptions of torch for damaged pickles."""


class Weights(NamedTuple):
    node: dict[str, Any]
    """Configuration of the encoder, including `clip_shape`."""
    tensors: dict[str, Tensor]
    """Tensors by our names."""
    mean: Sequence[float]
    std: Sequence[float]


@checkpoint.as_checkpoint_errors()
def read_weights(source: Source, *, num_heads: int | None = None) -> Weights:
    """Reads an encoder from any source but timm. `num_heads` is needed for files of a width that is not published.

    Raises CheckpointError, naming the source, if it is damaged, of another architecture or contains no encoder.
    """
    if source.kind == "hub":
        folder = download(source.location)
        with checkpoint.as_checkpoint_errors(f"{source}: "):
            source = find_source(folder)
    readers: dict[str, Callable[[Path], Weights]] = {
        "run": _read_run,
        "exported": _read_exported,
        "transformers": _read_transformers,
    }
    path = Path(source.location)
    weights = readers[source.kind](path) if source.kind in readers else _read_file(path, num_heads)
    channels = weights.node["clip_shape"][0]
    if {channels} != {len(weights.mean), len(weights.std)}:
        raise CheckpointError(f"{source}: mean and std of the pixels are not those of {channels} channels")
    return weights


def write_encoder(folder: Path, encoder: Any) -> None:
    """Writes an encoder of `open_encoder` as config.json and model.safetensors, which `read_weights` reads."""
    normalise = encoder.transform.normalise
    config = {"format": ENCODER_FORMAT, "encoder": encoder.node, "mean": normalise.mean, "std": normalise.std}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    tensors = {name: tensor.contiguous() for name, tensor in encoder.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")


def load_exact(encoder: nn.Module, tensors: Mapping[str, Tensor], source: Source) -> None:
    """Loads the tensors; raises CheckpointError if their names or shapes are not those of the encoder."""
    check_tensors(encoder.state_dict(), tensors, source)
    encoder.load_state_dict(dict(tensors))


def _read_run(path: Path) -> Weights:
    """Reads a run folder or a checkpoint; old checkpoints have the encoder's node only in their configuration."""
    folder = checkpoint.find(path)
    state = checkpoint.read_state(folder)
    as_mapping(state, folder / "state.json", {"backbone": str, "clip_shape": CLIP_SHAPE, **PIXEL_FIELDS})
    config = {} if state.get("encoder") else read_config(folder, {"encoder": dict})
    node = state.get("encoder") or config["encoder"] | {"clip_shape": state["clip_shape"]}
    tensors = checkpoint.load_model(folder, state["backbone"] + ".")
    return Weights(check_node(node, folder), tensors, state["mean"], state["std"])


def _read_exported(path: Path) -> Weights:
    config = read_json(path / "config.json", {"encoder": dict, **PIXEL_FIELDS})
    return Weights(check_node(config["encoder"], path), _read_safetensors(path), config["mean"], config["std"])


def _read_transformers(path: Path) -> Weights:
    """Reads a folder of transformers; missing keys have the defaults of IJepaConfig and VJEPA2Config."""
    stored, tensors = read_json(path / "config.json", TRANSFORMERS_FIELDS), _read_safetensors(path)
    config = {name: value for name, value in stored.items() if value is not None}
    kind = config["model_type"]
    if (act := config.get("hidden_act", "gelu")) != "gelu":
        raise CheckpointError(f"{path}: hidden_act={act}; our encoders support only the exact gelu")
    tensors = {name.removeprefix(f"{kind}."): tensor for name, tensor in tensors.items()}  # prefix in a classifier
    names, ignored = {
        "ijepa": (IJEPA, ("pooler.", "classifier.", "embeddings.mask_token")),
        "vjepa2": (VJEPA2, ("predictor.", "pooler.", "classifier.")),
    }[kind]
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(ignored)}
    if config.get("qkv_bias") is False:
        tensors |= _zero_biases(tensors, names)
    translated, sizes = _translate(tensors, names, path, needs_table=kind == "ijepa")
    sizes |= {"norm_eps": config.get("layer_norm_eps", 1e-12 if kind == "ijepa" else 1e-6)}
    heads, channels = config.get("num_attention_heads", 12 if kind == "ijepa" else 16), sizes.pop("channels")
    if kind == "ijepa":
        clip = [1, *as_pair(config.get("image_size", 224))]
        node = {"_target_": SPATIAL, "clip_shape": [channels, *clip], "position": "table"}
    else:
        clip = [config.get("frames_per_clip", 64), *as_pair(config.get("crop_size", 256))]
        node = {"_target_": TEMPORAL, "clip_shape": [channels, *clip], "position": "vjepa2"}
    return Weights(node | sizes | {"num_heads": heads}, translated, *_pixel_statistics(path, channels))


def _read_file(path: Path, num_heads: int | None) -> Weights:
    """Reads a file of I-JEPA, V-JEPA or V-JEPA 2; it is an encoder of images if its patches have no time axis."""
    stored = _unpickle(path)
    tensors = _encoder_in(stored, path)
    patch = tensors.get("patch_embed.proj.weight")
    if patch is None or patch.ndim not in (4, 5):
        raise CheckpointError(f"{path} holds no encoder of I-JEPA or V-JEPA: it lacks patch_embed.proj.weight")
    is_rotary = patch.ndim == 5 and ("pos_embed" not in tensors or _has_rotary_predictor(stored))
    if is_rotary:
        tensors.pop("pos_embed", None)
    translated, sizes = _translate(tensors, PUBLISHED, path, needs_table=not is_rotary)
    width, channels = sizes["embed_dim"], sizes.pop("channels")
    num_heads = num_heads or (NUM_HEADS_ROTARY if is_rotary else NUM_HEADS).get(width)
    if num_heads is None:
        raise CheckpointError(
            f"{path}: a width of {width} is of no published encoder, and the file does not contain the number of "
            "attention heads; give encoder.attention_heads"
        )
    clip = ROTARY_CLIP
    if not is_rotary:
        grid, patch_size = _square_grid(translated[TABLE], patch.ndim == 5, path), sizes["patch_size"]
        clip = (grid[0] * sizes.get("tubelet_size", 1), grid[1] * patch_size[0], grid[2] * patch_size[1])
    node = {
        "_target_": SPATIAL if patch.ndim == 4 else TEMPORAL, "clip_shape": [channels, *clip],
        "position": "vjepa2" if is_rotary else "table", "num_heads": num_heads,
    }  # fmt: skip
    return Weights(node | sizes, translated, *_pixel_statistics(path.parent, channels))


def _translate(
    tensors: Mapping[str, Tensor], names: Names, path: Path, *, needs_table: bool
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by our names, and the sizes that follow from their shapes."""
    depth = count_blocks(tensors, names)
    pairs = name_pairs(names, max(depth, 1))
    required = {name for ours, foreign in pairs if ours != TABLE or needs_table for name in foreign}
    check_names(path, missing=required - tensors.keys(), unexpected=tensors.keys() - required)
    patch = tensors[f"{names['embed'][0]}.weight"]
    hidden = tensors[names["blocks.{}.mlp.fc1"][0].format(0) + ".weight"]
    table = tensors[names[TABLE][0]] if needs_table else None
    is_wrong = patch.ndim not in (4, 5) or hidden.ndim != 2 or not min(*patch.shape, *hidden.shape)
    if is_wrong or (table is not None and (table.ndim != 3 or table.shape[0] != 1)):
        raise _wrong_shapes(path)
    width, channels, *extent = patch.shape
    ratio = len(hidden) / width
    sizes = {
        "channels": channels, "patch_size": list(extent[-2:]),
        **({"tubelet_size": extent[0]} if len(extent) == 3 else {}), "embed_dim": width, "depth": depth,
        "mlp_ratio": ratio if int(width * ratio) == len(hidden) else (len(hidden) + 0.5) / width, "norm_eps": 1e-6,
    }  # fmt: skip
    try:
        return {name: tensor.float() for name, tensor in from_foreign(tensors, names).items()}, sizes
    except (RuntimeError, IndexError) as error:
        raise _wrong_shapes(path) from error


def _wrong_shapes(path: Path) -> CheckpointError:
    return CheckpointError(f"{path}: its tensors have shapes that no encoder of I-JEPA or V-JEPA has")


def _zero_biases(tensors: Mapping[str, Tensor], names: Names) -> dict[str, Tensor]:
    """Zero biases for queries, keys and values, equivalent to none."""
    depth = count_blocks(tensors, names)
    stems = [stem.format(number) for stem in names["blocks.{}.attn.qkv"] for number in range(depth)]
    weights = {stem: tensors[f"{stem}.weight"] for stem in stems if f"{stem}.weight" in tensors}
    return {f"{stem}.bias": torch.zeros(len(weight)) for stem, weight in weights.items()}


def _encoder_in(stored: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """The tensors of the target encoder, else of the encoder, else of the file itself if it has only tensors."""
    state = next((stored[key] for key in ("target_encoder", "encoder") if isinstance(stored.get(key), Mapping)), stored)
    if not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()):
        names = first_names(sorted(map(str, state)))
        raise CheckpointError(f"{path} holds neither target_encoder nor encoder, but {names}")
    for name, tensor in state.items():
        if tensor.layout is not torch.strided or tensor.device.type != "cpu" or not tensor.is_floating_point():
            raise CheckpointError(f"{path}: {name} is no dense tensor of floating point numbers")
    if (size := sum(tensor.nbytes for tensor in state.values())) > path.stat().st_size:
        raise CheckpointError(f"{path} is damaged: its tensors have {size:,} bytes, more than the file")
    return {_strip_prefix(name): tensor for name, tensor in state.items()}


def _strip_prefix(name: str) -> str:
    return name.removeprefix("module.").removeprefix("backbone.")


def _has_rotary_predictor(stored: Mapping[str, Any]) -> bool:
    predictor = stored.get("predictor")
    names = map(_strip_prefix, map(str, predictor)) if isinstance(predictor, Mapping) else ()
    return sum(name.startswith("mask_tokens.") for name in names) > NUM_MASK_TOKENS


def _square_grid(table: Tensor, in_time: bool, path: Path) -> tuple[int, int, int]:
    """Steps, rows and columns of a table [N, D] of square images.

    Column 0 of a 3-D table is the sine of the time, which is constant within a step and differs between steps.
    """
    total = len(table)
    later = (table[:, 0] != table[0, 0]).nonzero()
    num_patches = int(later[0]) if in_time and len(later) else total
    side = math.isqrt(num_patches)
    if side * side != num_patches or total % num_patches:
        raise CheckpointError(f"{path}: {total} positions do not form a square image; other sizes are not supported")
    return total // num_patches, side, side


def _pixel_statistics(folder: Path, channels: int) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation of each channel from a preprocessor's configuration, else of natural images."""
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        config = read_json(folder / name, PREPROCESSOR_FIELDS) if (folder / name).is_file() else {}
        if len(config.get("image_mean") or ()) == len(config.get("image_std") or ()) == channels:
            return config["image_mean"], config["image_std"]
    return IMAGENET_STATS.get(channels, ([0.5] * channels, [0.5] * channels))


def _unpickle(path: Path) -> Mapping[str, Any]:
    try:
        is_zip = zipfile.is_zipfile(path)
        if is_zip and any(part.compress_type for part in zipfile.ZipFile(path).infolist()):
            raise CheckpointError(f"{path} is a compressed archive; {EXPECTED}")
        stored = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        if re.search("GLOBAL|instantiate", str(error)):
            raise CheckpointError(f"{path} names code to run and is not read: only tensors are expected") from error
        raise CheckpointError(f"{path} is no checkpoint of PyTorch; {EXPECTED}") from error
    except CheckpointError:
        raise
    except _PICKLE_ERRORS as error:
        raise CheckpointError(f"{path} is damaged or no checkpoint of PyTorch ({first_line(error)})") from error
    if not isinstance(stored, Mapping):
        raise CheckpointError(f"{path} holds a {type(stored).__name__}, no named tensors; {EXPECTED}")
    return stored


def _read_safetensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors, or of the files that its index lists."""
    index = folder / "model.safetensors.index.json"
    weight_map = read_json(index, {"weight_map": Mapping[str, str]})["weight_map"] if index.is_file() else {}
    files = sorted(set(weight_map.values())) or ["model.safetensors"]
    tensors = {}
    for name in files:
        if Path(name).name != name or not (folder / name).is_file():
            raise CheckpointError(f"{folder} has no {name}; the weights must be there as safetensors")
        try:
            tensors |= load_file(folder / name)
        except (SafetensorError, OSError, ValueError, LookupError, TypeError, RuntimeError) as error:
            raise CheckpointError(f"{folder / name} is damaged ({first_line(error)})") from error
    return tensors


def download(name: str) -> str:
    """The local folder of a model on the hub, ORG/NAME or ORG/NAME@REVISION, with its configuration and safetensors."""
    from huggingface_hub import snapshot_download

    repository, _, revision = name.partition("@")
    try:
        return snapshot_download(repository, revision=revision or None, allow_patterns=["*.json", "*.safetensors"])
    except OSError as error:
        raise CheckpointError(f"{name} is not on this machine and cannot be fetched ({first_line(error)})") from error
