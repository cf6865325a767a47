"""A folder for `AutoModel.from_pretrained(FOLDER)`: IJepaModel for images, VJEPA2Model for clips."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from jepa.encoders.names import IJEPA, TABLE, VJEPA2, to_foreign
from jepa.encoders.spatial import SpatialEncoder
from jepa.encoders.temporal import TemporalEncoder
from jepa.exporters.format import (
    EncodeFn,
    ExportFormat,
    frame_notes,
    image_input,
    mlp_width,
    pixel_statistics,
    quoted,
    require,
    unsupported,
    write_json,
)

BILINEAR = 2
"""Number of the resampling filter in Pillow."""


def write(encoder: Any, folder: Path) -> None:
    transformers = require("transformers")
    if isinstance(encoder, SpatialEncoder):
        config = transformers.IJepaConfig(**_image_sizes(encoder))
        patch = (encoder.clip_shape[0], *encoder.patch_size)
        tensors = to_foreign(encoder.state_dict() | {TABLE: encoder.positions.table}, IJEPA, patch)
        write_json(folder / "preprocessor_config.json", _processing(encoder, image_processor_type="ViTImageProcessor"))
    else:
        if reason := _why_no_vjepa2(encoder):
            raise unsupported("transformers", encoder, reason)
        patch = (encoder.clip_shape[0], encoder.tubelet_size, *encoder.patch_size)
        config = transformers.VJEPA2Config(**_clip_sizes(encoder))
        tensors = to_foreign(encoder.state_dict(), VJEPA2, patch) | _zero_predictor(encoder.embed_dim)
        processing = _processing(encoder, video_processor_type="BaseVideoProcessor", do_sample_frames=False)
        write_json(folder / "video_preprocessor_config.json", processing)
    config.to_json_file(folder / "config.json")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _why_no_vjepa2(encoder: nn.Module) -> str | None:
    """Why VJEPA2Model cannot represent the encoder; None if it can."""
    if not isinstance(encoder, TemporalEncoder):
        return "there is no equivalent model; use timm, onnx or torch_export"
    if encoder.positions.kind != "vjepa2":
        return (
            f"VJEPA2Model needs encoder.position=vjepa2, this encoder has {encoder.positions.kind}; "
            "use onnx or torch_export, or train with encoder.position=vjepa2"
        )
    (height, width), (patch_height, patch_width) = encoder.clip_shape[2:], encoder.patch_size
    if height != width or patch_height != patch_width:
        size = f"{height}x{width} pixels in patches of {patch_height}x{patch_width}"
        return f"VJEPA2Model needs square images and patches, not {size}; use torch_export"
    return None


def _common_sizes(encoder: Any) -> dict[str, Any]:
    return {
        "hidden_size": encoder.embed_dim, "num_hidden_layers": len(encoder.blocks),
        "num_attention_heads": encoder.num_heads, "layer_norm_eps": encoder.norm.eps,
    }  # fmt: skip


def _image_sizes(encoder: Any) -> dict[str, Any]:
    channels, height, width = image_input(encoder)
    patch_height, patch_width = encoder.patch_size
    return {
        "architectures": ["IJepaModel"],
        **_common_sizes(encoder),
        "intermediate_size": mlp_width("transformers", encoder),
        "image_size": height if height == width else [height, width],
        "patch_size": patch_height if patch_height == patch_width else [patch_height, patch_width],
        "num_channels": channels,
    }


def _clip_sizes(encoder: Any) -> dict[str, Any]:
    """Sizes of a VJEPA2Model whose predictor, which it always has, is without layers."""
    channels, frames, side, _ = encoder.clip_shape
    return {
        "architectures": ["VJEPA2Model"], **_common_sizes(encoder),
        "mlp_ratio": mlp_width("transformers", encoder) / encoder.embed_dim, "crop_size": side,
        "frames_per_clip": frames, "patch_size": encoder.patch_size[0], "tubelet_size": encoder.tubelet_size,
        "in_chans": channels, "pred_hidden_size": 1, "pred_num_attention_heads": 1, "pred_num_hidden_layers": 0,
        "pred_num_mask_tokens": 1,
    }  # fmt: skip


def _zero_predictor(width: int) -> dict[str, Tensor]:
    """Zero tensors for the predictor without layers; missing ones would be initialised at random on loading."""
    shapes = {
        "embeddings.mask_tokens": (1, 1, 1, 1), "embeddings.predictor_embeddings.weight": (1, width),
        "embeddings.predictor_embeddings.bias": (1,), "layernorm.weight": (1,), "layernorm.bias": (1,),
        "proj.weight": (width, 1), "proj.bias": (width,),
    }  # fmt: skip
    return {f"predictor.{name}": torch.zeros(shape) for name, shape in shapes.items()}


def _processing(encoder: Any, **kind: Any) -> dict[str, Any]:
    """Resize the shorter side, then crop the centre; for a size that is not square, resize without a crop."""
    height, width = encoder.clip_shape[2:]
    mean, std = pixel_statistics(encoder)
    return {
        **kind, "do_resize": True,
        "size": {"shortest_edge": height} if height == width else {"height": height, "width": width},
        "default_to_square": False, "resample": BILINEAR, "do_center_crop": height == width,
        "crop_size": {"height": height, "width": width}, "do_convert_rgb": len(mean) == 3, "do_rescale": True,
        "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": mean, "image_std": std,
    }  # fmt: skip


def load(folder: Path) -> EncodeFn:
    transformers = require("transformers")
    with _quiet(transformers.logging):
        model: Any = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()
    if model.config.model_type == "vjepa2":
        return lambda clips: model.get_vision_features(clips.transpose(1, 2))
    return lambda images: model(images).last_hidden_state


@contextmanager
def _quiet(log: Any) -> Iterator[None]:
    """Suppress progress bars and log messages of transformers."""
    had_bars, level = log.is_progress_bar_enabled(), log.get_verbosity()
    log.disable_progress_bar()
    log.set_verbosity_error()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if had_bars:
            log.enable_progress_bar()


def snippet(encoder: Any, location: str) -> str:
    channels, frames, height, width = encoder.clip_shape
    if isinstance(encoder, SpatialEncoder):
        return f"""\
import torch
from transformers import AutoImageProcessor, AutoModel
processor = AutoImageProcessor.from_pretrained({quoted(location)})
model = AutoModel.from_pretrained({quoted(location)}).eval()
images = torch.randint(0, 256, (2, {channels}, {height}, {width}), dtype=torch.uint8)  # of any size
pixels = processor(images, return_tensors="pt")["pixel_values"]
tokens = model(pixels).last_hidden_state  # [2, {encoder.frame_grid.num_tokens}, {encoder.embed_dim}]"""
    return f"""\
import torch
from transformers import AutoModel, AutoVideoProcessor
processor = AutoVideoProcessor.from_pretrained({quoted(location)})
model = AutoModel.from_pretrained({quoted(location)}).eval()
clips = list(torch.randint(0, 256, (2, {frames}, {channels}, {height}, {width}), dtype=torch.uint8))  # of any size
pixels = processor(clips, return_tensors="pt")["pixel_values_videos"]
tokens = model.get_vision_features(pixels)  # [2, {encoder.grid.num_tokens}, {encoder.embed_dim}]"""


def notes(encoder: Any) -> list[str]:
    height, width = encoder.clip_shape[2:]
    predictor = (
        "A VJEPA2Model always has a predictor; this one has no layers and predicts zeros. Use "
        "`model.get_vision_features(pixels)` or `model(pixels, skip_predictor=True).last_hidden_state`."
    )
    hints = [predictor] if isinstance(encoder, TemporalEncoder) else frame_notes(encoder)
    if height != width:
        hints.append(f"The processor resizes every image to {height}x{width}; crop to that aspect ratio first.")
    return hints


def input_shape(encoder: Any) -> tuple[int, ...]:
    return image_input(encoder) if isinstance(encoder, SpatialEncoder) else (*encoder.clip_shape,)


FORMAT = ExportFormat("transformers", write, load, snippet, input_shape, notes, "{}")
