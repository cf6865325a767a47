"""A folder for `timm.create_model("local-dir:FOLDER", pretrained=True)`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
from safetensors.torch import save_file
from timm.models.eva import Eva
from torch import Tensor, nn

from jepa.encoders.names import PUBLISHED, TABLE, to_foreign
from jepa.encoders.pretrained import TimmEncoder
from jepa.encoders.spatial import SpatialEncoder
from jepa.exporters.format import ExportFormat, Run, image_input, pixel_statistics, quoted, unsupported, write_json

ARCHITECTURE = "vit_base_patch16_224"
"""the entry of timm whose sizes are replaced, all of them"""


def write(encoder: Any, folder: Path) -> None:
    if isinstance(encoder, SpatialEncoder):
        architecture, arguments = ARCHITECTURE, _arguments(encoder)
        patch = (encoder.clip_shape[0], *encoder.patch_size)
        tensors = to_foreign(encoder.state_dict() | {TABLE: encoder.positions.table}, PUBLISHED, patch)
    elif isinstance(encoder, TimmEncoder):
        architecture, arguments = encoder.node["architecture"], _arguments_of_timm(encoder)
        tensors = {name: tensor.contiguous() for name, tensor in encoder.trunk.state_dict().items()}
    else:
        raise unsupported("timm", encoder, "timm's VisionTransformer sees images, not clips; use onnx or torch_export")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    mean, std = pixel_statistics(encoder)
    pictures = {
        "input_size": list(image_input(encoder)),
        "fixed_input_size": True,
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "crop_mode": "center",
        "mean": mean,
        "std": std,
        "num_classes": 0,
        "pool_size": None,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    config = {"architecture": architecture, "num_classes": 0, "model_args": arguments, "pretrained_cfg": pictures}
    write_json(folder / "config.json", config)


def _arguments(encoder: SpatialEncoder) -> dict[str, Any]:
    """Those of timm's VisionTransformer; without fc_norm, since ours norms the tokens and then takes the mean."""
    channels, height, width = image_input(encoder)
    hidden: Any = encoder.blocks[0].mlp.fc1.out_features  # pyright: ignore[reportAttributeAccessIssue]
    return {
        "img_size": [height, width],
        "patch_size": list(encoder.patch_size),
        "in_chans": channels,
        "num_classes": 0,
        "global_pool": "avg",
        "fc_norm": False,
        "class_token": False,
        "embed_dim": encoder.embed_dim,
        "depth": len(encoder.blocks),
        "num_heads": encoder.num_heads,
        "mlp_ratio": hidden / encoder.embed_dim,
    }


def _arguments_of_timm(encoder: TimmEncoder) -> dict[str, Any]:
    """Without pooling, which some do by layers that are no part of our encoder."""
    channels, height, width = image_input(encoder)
    norms_pooled = not isinstance(encoder.trunk.fc_norm, nn.Identity)
    return encoder.node["arguments"] | {
        "img_size": [height, width],
        "in_chans": channels,
        "num_classes": 0,
        "global_pool": "",
        "use_fc_norm" if isinstance(encoder.trunk, Eva) else "fc_norm": norms_pooled,
    }


def load(folder: Path) -> Run:
    model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()

    def run(images: Tensor) -> Tensor:
        tokens = model.forward_features(images) if model.global_pool else model(images)
        return tokens[:, model.num_prefix_tokens :]

    return run


def snippet(encoder: Any, where: str) -> str:
    shape = ", ".join(map(str, image_input(encoder)))
    source = where if where.startswith("hf-hub:") else f"local-dir:{where}"
    size = f"[2, {encoder.grid.h * encoder.grid.w}, {encoder.embed_dim}]"
    use = f"""\
tokens = model.forward_features(images)  # {size}
features = model(images)  # [2, {encoder.embed_dim}], the mean token"""
    if isinstance(encoder, TimmEncoder):
        use = f"tokens = model(images)[:, model.num_prefix_tokens :]  # {size}"
    return f"""\
import timm, torch
model = timm.create_model({quoted(source)}, pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))  # of a PIL image
images = torch.randn(2, {shape})  # or: torch.stack([transform(image) for image in pictures])
{use}"""


def notes(encoder: Any) -> list[str]:
    if isinstance(encoder, TimmEncoder):
        return ["`model(images)` gives all tokens, the class and register tokens first; there is no head."]
    found = ["`model.forward_features` gives the tokens, `model` their mean; there is no class token and no head."]
    if encoder.clip_shape[1] > 1:
        found.append("It was trained on the frames of clips, of which each is seen alone.")
    return found


FORM = ExportFormat("timm", write, load, snippet, image_input, notes, "hf-hub:{}")
