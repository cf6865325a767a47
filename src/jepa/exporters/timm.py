"""A folder for `timm.create_model("local-dir:FOLDER", pretrained=True)`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
from safetensors.torch import save_file
from timm.models.eva import Eva
from torch import nn

from jepa.encoders.names import PUBLISHED, TABLE, to_foreign
from jepa.encoders.pretrained import TimmEncoder
from jepa.encoders.spatial import SpatialEncoder
from jepa.exporters.format import (
    EncodeFn,
    ExportFormat,
    frame_notes,
    image_input,
    mlp_width,
    pixel_statistics,
    quoted,
    unsupported,
    write_json,
)

ARCHITECTURE = "vit_base_patch16_224"
"""Entry of timm's registry; `model_args` replace all its sizes."""


def write(encoder: Any, folder: Path) -> None:
    if isinstance(encoder, SpatialEncoder):
        architecture, arguments = ARCHITECTURE, _arguments(encoder)
        patch = (encoder.clip_shape[0], *encoder.patch_size)
        tensors = to_foreign(encoder.state_dict() | {TABLE: encoder.positions.table}, PUBLISHED, patch)
    elif isinstance(encoder, TimmEncoder):
        architecture, arguments = encoder.node["architecture"], _arguments_of_timm(encoder)
        tensors = {name: tensor.contiguous() for name, tensor in encoder.trunk.state_dict().items()}
    else:
        raise unsupported("timm", encoder, "timm's VisionTransformer takes images, not clips; use onnx or torch_export")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    mean, std = pixel_statistics(encoder)
    pretrained_cfg = {
        "input_size": list(image_input(encoder)), "fixed_input_size": True, "interpolation": "bilinear",
        "crop_pct": 1.0, "crop_mode": "center", "mean": mean, "std": std, "num_classes": 0, "pool_size": None,
        "first_conv": "patch_embed.proj", "classifier": "head",
    }  # fmt: skip
    config = {"architecture": architecture, "num_classes": 0, "model_args": arguments, "pretrained_cfg": pretrained_cfg}
    write_json(folder / "config.json", config)


def _arguments(encoder: Any) -> dict[str, Any]:
    """Arguments of timm's VisionTransformer; without fc_norm, since our encoder normalises before the mean."""
    return _input_arguments(encoder) | {
        "patch_size": list(encoder.patch_size),
        "global_pool": "avg",
        "fc_norm": False,
        "class_token": False,
        "embed_dim": encoder.embed_dim,
        "depth": len(encoder.blocks),
        "num_heads": encoder.num_heads,
        "mlp_ratio": mlp_width("timm", encoder) / encoder.embed_dim,
    }


def _arguments_of_timm(encoder: TimmEncoder) -> dict[str, Any]:
    """Arguments of the wrapped model without pooling, which may have layers that our encoder does not use."""
    norms_pooled = not isinstance(encoder.trunk.fc_norm, nn.Identity)
    norm_key = "use_fc_norm" if isinstance(encoder.trunk, Eva) else "fc_norm"
    return encoder.node["arguments"] | _input_arguments(encoder) | {"global_pool": "", norm_key: norms_pooled}


def _input_arguments(encoder: Any) -> dict[str, Any]:
    channels, height, width = image_input(encoder)
    return {"img_size": [height, width], "in_chans": channels, "num_classes": 0}


def load(folder: Path) -> EncodeFn:
    model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    forward = model.forward_features if model.global_pool else model
    return lambda images: forward(images)[:, model.num_prefix_tokens :]


def snippet(encoder: Any, location: str) -> str:
    shape = ", ".join(map(str, image_input(encoder)))
    source = location if location.startswith("hf-hub:") else f"local-dir:{location}"
    size = f"[2, {encoder.grid.h * encoder.grid.w}, {encoder.embed_dim}]"
    use = f"""\
tokens = model.forward_features(images)  # {size}
features = model(images)  # [2, {encoder.embed_dim}], the mean token"""
    if isinstance(encoder, TimmEncoder):
        use = f"tokens = model(images)[:, model.num_prefix_tokens :]  # {size}"
    return f"""\
import timm, torch
model = timm.create_model({quoted(source)}, pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))  # for a PIL image
images = torch.randn(2, {shape})  # or: torch.stack([transform(image) for image in pil_images])
{use}"""


def notes(encoder: Any) -> list[str]:
    if isinstance(encoder, TimmEncoder):
        return ["`model(images)` returns all tokens, class and register tokens first; there is no head."]
    hint = "`model.forward_features` returns the tokens, `model` their mean; there is no class token and no head."
    return [hint, *frame_notes(encoder)]


FORMAT = ExportFormat("timm", write, load, snippet, image_input, notes, "hf-hub:{}")
