"""A folder for `timm.create_model("local-dir:FOLDER", pretrained=True)`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
from safetensors.torch import save_file

from jepa.encoders.spatial import SpatialEncoder
from jepa.exporters.form import Form, Run, pixel_statistics, quoted, refuse, takes_images, write_json
from jepa.renames import PUBLISHED, TABLE, to_foreign

ARCHITECTURE = "vit_base_patch16_224"
"""the entry of timm whose sizes are replaced, all of them"""


def write(encoder: Any, folder: Path) -> None:
    if not isinstance(encoder, SpatialEncoder):
        raise refuse("timm", encoder, "timm's VisionTransformer sees images, not clips; use onnx or torch_export")
    tensors = encoder.state_dict() | {TABLE: encoder.positions.table}
    channels, height, width = takes_images(encoder)
    named = to_foreign(tensors, PUBLISHED, (channels, *encoder.patch_size))
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    mean, std = pixel_statistics(encoder)
    write_json(
        folder / "config.json",
        {
            "architecture": ARCHITECTURE,
            "num_classes": 0,
            "num_features": encoder.embed_dim,
            "model_args": _arguments(encoder),
            "pretrained_cfg": {
                "input_size": [channels, height, width],
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
            },
        },
    )


def _arguments(encoder: SpatialEncoder) -> dict[str, Any]:
    """Those of timm's VisionTransformer; without fc_norm, since ours norms the tokens and then takes the mean."""
    channels, height, width = takes_images(encoder)
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


def reopen(folder: Path) -> Run:
    model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    return model.forward_features


def snippet(encoder: Any, where: str) -> str:
    shape = ", ".join(map(str, takes_images(encoder)))
    source = where if where.startswith("hf-hub:") else f"local-dir:{where}"
    return f"""\
import timm, torch
model = timm.create_model({quoted(source)}, pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))  # of a PIL image
images = torch.randn(2, {shape})  # or: torch.stack([transform(image) for image in pictures])
tokens = model.forward_features(images)  # [2, {encoder.frame_grid.num_tokens}, {encoder.embed_dim}]
features = model(images)  # [2, {encoder.embed_dim}], the mean token"""


def notes(encoder: Any) -> list[str]:
    found = ["`model.forward_features` gives the tokens, `model` their mean; there is no class token and no head."]
    if encoder.clip_shape[1] > 1:
        found.append("It was trained on the frames of clips, of which each is seen alone.")
    return found


FORM = Form("timm", write, reopen, snippet, takes_images, notes)
