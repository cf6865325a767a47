"""Encoders with pretrained weights: ours, published ones translated into ours, and wrapped models of timm."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from einops import rearrange
from safetensors import SafetensorError
from timm.layers.patch_embed import PatchEmbed
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes, is_in_torch_dispatch_mode
from torch.utils.checkpoint import checkpoint

from jepa.config.files import Fields, as_mapping, read_json
from jepa.config.paths import Source, find_source
from jepa.data.transforms import EvalTransform
from jepa.encoders.names import TABLE
from jepa.encoders.nodes import build, check_timm, outline, tensor_sizes
from jepa.encoders.published import Weights, download, load_exact, read_weights
from jepa.layers.position import resample
from jepa.layers.shapes import ShapesOnly, fake_init
from jepa.layers.tokens import as_pair, gather_tokens, grid_of, make_grid
from jepa.runs.checkpoint import CheckpointError, as_checkpoint_errors
from jepa.suggestions import suggestion
from jepa.types import ClipShape, PatchGrid, PositiveInt, ShareBelowOne

TIMM_FIELDS: Fields = {"architecture": str, "model_args": dict | None, "pretrained_cfg": dict | None}
"""Fields of timm's config.json that are read."""
PRETRAINED_FIELDS: Fields = {
    "input_size": tuple[PositiveInt, PositiveInt, PositiveInt] | None,
    **dict.fromkeys(("mean", "std"), Sequence[float] | None),
}
"""Fields of `pretrained_cfg` in timm's config.json, or of the file itself, that are read."""
MAX_FRESH = 1 << 33
"""Largest number of weights of a model of timm that is built without a file of weights."""
MAX_DEPTH = 200
"""Largest number of blocks of such a model."""
MAX_RESAMPLED = 1 << 24
"""Largest number of weights that a model may have beyond those of its file, for positions of another size."""
DERIVED = {"num_classes", "img_size", "in_chans", "drop_path_rate", "dynamic_img_size"}
"""Arguments of timm's models that follow from ours, or that only the classifier needs."""


def open_encoder(
    source: str | os.PathLike, *, clip_shape: Sequence[int] | None = None, fresh: bool = False
) -> nn.Module:
    """An encoder from any source, in eval mode, on the CPU: [B, C, T, H, W] or [B, C, H, W] -> tokens [B, N, D].

    `source` is a run folder or a checkpoint, a folder that jepa-export or transformers wrote (IJepaModel, VJEPA2Model),
    a published file of I-JEPA, V-JEPA or V-JEPA 2, hf:ORG/NAME, or timm:NAME. `.transform` makes clips from uint8
    images of any size, `.node` is the configuration that builds the encoder without the source, `.num_prefix_tokens`
    is the number of class and register tokens, which are not returned. `clip_shape` (C, T, H, W) replaces the one of
    its training, `fresh` leaves the weights random. Raises CheckpointError for a damaged source or one without an
    encoder. Only encoders of this package and of timm are built, so that no source can name code to run.
    """
    with as_checkpoint_errors():
        resolved = find_source(os.fspath(source))
    encoder, mean, std = _open(resolved, clip_shape, fresh=fresh)
    encoder.transform = EvalTransform(image_size=encoder.clip_shape[2:], mean=mean, std=std)
    return encoder.eval()


def pretrained_encoder(
    *, clip_shape: Sequence[int], weights: str, fresh: bool = False, attention_heads: PositiveInt | None = None,
    drop_path: ShareBelowOne = 0.0, checkpoint_activations: bool = False,
) -> nn.Module:  # fmt: skip
    """The encoder of `weights`, a source of `open_encoder`, for further training on clips of `clip_shape`."""
    values = {"drop_path": drop_path, "checkpoint_activations": checkpoint_activations}
    return _open(find_source(weights), clip_shape, fresh=fresh, attention_heads=attention_heads, values=values)[0]


def _open(
    source: Source, clip_shape: Sequence[int] | None, *, fresh: bool, attention_heads: int | None = None,
    values: Mapping[str, Any] | None = None,
) -> tuple[Any, Sequence[float], Sequence[float]]:  # fmt: skip
    """The encoder, with fake tensors in a fake mode, and mean and standard deviation of its training data."""
    fresh = fresh or is_in_torch_dispatch_mode()
    if source.kind == "timm":
        return _open_timm(source.location, clip_shape, fresh=fresh, values=values or {})
    with _disable_current_modes():
        weights = read_weights(source, num_heads=attention_heads)
        stored = outline(weights.node, weights.tensors, source, any_clip=clip_shape is not None)
    if values and next(stored.parameters(), None) is None:
        raise ValueError(f"{source} has no weights to train further: its tokens are the pixels (encoder=pixels)")
    node = weights.node | dict(values or {})
    node["clip_shape"] = list(node["clip_shape"] if clip_shape is None else clip_shape)
    if node["clip_shape"][0] != weights.node["clip_shape"][0]:
        raise ValueError(
            f"{source} reads {weights.node['clip_shape'][0]} channels, the data set has {node['clip_shape'][0]}: "
            "choose a data set with as many"
        )
    encoder = build(node)
    if not fresh:
        load_exact(encoder, _resample_positions(weights, stored, encoder), source)
    encoder.node = node
    return encoder, weights.mean, weights.std


def _resample_positions(weights: Weights, stored: Any, encoder: Any) -> dict[str, Tensor]:
    """The tensors, with positions resampled from the grid of the encoder `stored` to that of `encoder`."""
    if TABLE not in weights.tensors:
        return weights.tensors
    table = resample(weights.tensors[TABLE], stored.positions.grid, encoder.positions.grid)
    return weights.tensors | {TABLE: table}


class TimmEncoder(nn.Module):
    """A Vision Transformer of timm, which returns only the patch tokens, not class and register tokens.

    `architecture` is a name of timm, `arguments` go to its constructor. The weights come from `folder`, in the layout
    of timm and jepa-export, or are random. Positions are resampled as in timm. It encodes the frames of a clip one by
    one, and `keep` is supported for images only.
    """

    def __init__(
        self, *, clip_shape: Sequence[int], architecture: str, arguments: Mapping[str, Any] | None = None,
        folder: str | None = None, drop_path: ShareBelowOne = 0.0, checkpoint_activations: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        channels, frames, height, width = clip_shape
        if frames > 1:
            raise ValueError(f"timm:{architecture} takes single images, got num_frames={frames}: use num_frames=1")
        derived = {"img_size": (height, width), "in_chans": channels, "drop_path_rate": drop_path}
        trunk = _create(architecture, folder, {**(arguments or {}), **derived})
        trunk.blocks = nn.ModuleList(trunk.blocks)  # like those of our encoders, so that FSDP shards each block
        trunk.reset_classifier(0, "")
        self.clip_shape: ClipShape = (channels, frames, height, width)
        self.patch_size = as_pair(trunk.patch_embed.patch_size)
        self.grid = make_grid((frames, height, width), self.patch_size)
        self.embed_dim: int = trunk.embed_dim
        self.num_heads: int = trunk.get_submodule("blocks.0.attn").num_heads
        self.num_prefix_tokens: int = trunk.num_prefix_tokens
        self.checkpoint_activations = checkpoint_activations
        self.trunk = trunk
        self.node = {
            "_target_": "jepa.encoders.pretrained.TimmEncoder", "clip_shape": [channels, frames, height, width],
            "architecture": architecture, "arguments": dict(arguments or {}), "drop_path": drop_path,
            "checkpoint_activations": checkpoint_activations,
        }  # fmt: skip

    @property
    def blocks(self) -> nn.ModuleList:
        return self.trunk.blocks

    def forward(self, clips: Tensor, keep: Tensor | None = None) -> Tensor:
        """[B, C, T, H, W] or [B, C, H, W] -> [B, N, D]; with `keep` [B, K] only those tokens: [B, K, D]."""
        grid = self.grid_of(clips)
        if keep is not None and grid.t > 1:
            raise ValueError(f"encoders of timm take masks only for single images, got clips of {grid.t} frames")
        images = clips if clips.ndim == 4 else rearrange(clips, "b c t h w -> (b t) c h w")
        tokens = self._run(images, keep)
        return rearrange(tokens, "(b t) n d -> b (t n) d", t=grid.t)

    def _run(self, images: Tensor, keep: Tensor | None) -> Tensor:
        """[B, C, H, W] -> [B, N or K, D]"""
        trunk, prefix = self.trunk, self.num_prefix_tokens
        tokens, rope = trunk._pos_embed(trunk.patch_embed(images)), None
        if isinstance(trunk, Eva):
            tokens, rope = tokens
        if keep is not None:
            tokens = torch.cat([tokens[:, :prefix], gather_tokens(tokens[:, prefix:], keep)], dim=1)
            rope = None if rope is None else rope[keep][:, None]  # [B, 1, K, 2 head_dim]
        tokens, options = trunk.norm_pre(tokens), {} if rope is None else {"rope": rope}
        for block in trunk.blocks:
            if self.checkpoint_activations and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, **options, use_reentrant=False)
            else:
                tokens = block(tokens, **options)
        return trunk.fc_norm(trunk.norm(tokens[:, prefix:]))

    def grid_of(self, clips: Tensor) -> PatchGrid:
        return grid_of(clips, self.clip_shape[0], self.patch_size)


def _open_timm(
    name: str, clip_shape: Sequence[int] | None, *, fresh: bool, values: Mapping[str, Any]
) -> tuple[Any, Sequence[float], Sequence[float]]:
    config, folder = _read_timm_config(name, fresh=fresh)
    preset = config.get("pretrained_cfg") or config
    channels, height, width = preset.get("input_size") or (3, 224, 224)
    arguments = {key: value for key, value in (config.get("model_args") or {}).items() if key not in DERIVED}
    if folder is not None:
        _check_size(Path(folder), config["architecture"], arguments | {"img_size": (height, width)})
    encoder = TimmEncoder(
        clip_shape=clip_shape or (channels, 1, height, width), architecture=config["architecture"], arguments=arguments,
        folder=None if fresh else folder, **values,
    )  # fmt: skip
    default = [0.5] * encoder.clip_shape[0]
    mean, std = (preset[key] if len(preset.get(key) or ()) == len(default) else default for key in ("mean", "std"))
    return encoder, mean, std


def _read_timm_config(name: str, *, fresh: bool) -> tuple[dict[str, Any], str | None]:
    """config.json of a model of timm, and the folder of its weights, None if it is `fresh` and needs none."""
    kind, _, location = name.rpartition(":")
    if not kind:
        pretrained_cfg = _registry_entry(name)
        if fresh:
            return {"architecture": name.partition(".")[0], "pretrained_cfg": pretrained_cfg}, None
        location = pretrained_cfg.get("hf_hub_id") or ""
        if not location:
            raise CheckpointError(f"timm:{name} has no weights; see timm.list_pretrained()")
    folder = location if kind == "local-dir" else download(location)
    path = Path(folder) / "config.json"
    with as_checkpoint_errors():
        config = read_json(path, TIMM_FIELDS)
        as_mapping(config.get("pretrained_cfg") or {}, f"{path}: pretrained_cfg", PRETRAINED_FIELDS)
        as_mapping(config, path, PRETRAINED_FIELDS)
    check_timm(config["architecture"], config.get("model_args") or {}, path)
    return config, folder


def _registry_entry(name: str) -> dict[str, Any]:
    """The pretrained_cfg of a model in timm's registry. Raises ValueError if there is no such model."""
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        hint = suggestion(architecture, timm.list_models())
        raise ValueError(f"timm:{name}: timm {timm.__version__} has no such model{hint}")
    try:
        pretrained_cfg = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise ValueError(f"timm:{name}: {error}") from error
    return pretrained_cfg.to_dict() if pretrained_cfg else {}


def _check_size(folder: Path, architecture: str, arguments: Mapping[str, Any]) -> None:
    """Raises CheckpointError where config.json describes a model larger than its weights, before it is built."""
    path = folder / "model.safetensors"
    sizes = tensor_sizes(path) if path.is_file() else [MAX_FRESH]
    if arguments.get("depth", 0) > max(len(sizes), MAX_DEPTH):
        raise CheckpointError(f"timm:{folder}: config.json describes more blocks than the file has tensors")
    with _disable_current_modes(), torch.random.fork_rng(devices=[]), fake_init(ShapesOnly()):
        trunk = _create(architecture, None, arguments)
    count = sum(tensor.numel() for tensor in (*trunk.parameters(), *trunk.buffers()))
    if count > 2 * sum(sizes) + MAX_RESAMPLED:
        raise CheckpointError(f"timm:{folder}: config.json describes {count:,} weights, {path.name} has {sum(sizes):,}")


def _create(architecture: str, folder: str | None, arguments: Mapping[str, Any]) -> Any:
    """A plain Vision Transformer of timm. Raises ValueError for other models, CheckpointError for wrong weights."""
    if folder is not None and not (Path(folder) / "model.safetensors").is_file():
        raise CheckpointError(f"{folder} has no model.safetensors; the weights must be there as safetensors")
    name = architecture if folder is None else f"local-dir:{folder}"
    try:
        trunk = timm.create_model(name, pretrained=folder is not None, dynamic_img_size=True, **arguments)
    except TypeError as error:
        raise ValueError(f"timm:{architecture} is no plain Vision Transformer ({error})") from error
    except (RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"timm:{name} cannot be read: {' '.join(str(error).split())[:240]}") from error
    if type(trunk) not in (VisionTransformer, Eva) or type(trunk.patch_embed) is not PatchEmbed:
        kinds = f"{type(trunk).__name__} with {type(trunk.patch_embed).__name__}"
        raise ValueError(f"timm:{architecture} is no plain Vision Transformer but {kinds}")
    if getattr(trunk, "rope_mixed", False):
        raise ValueError(f"timm:{architecture} has learned rotary positions in each block, which are not supported")
    return trunk
