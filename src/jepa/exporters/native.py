"""A folder for `jepa.load_encoder`: config.json and model.safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jepa.encoders.pretrained import open_encoder
from jepa.encoders.published import write_encoder
from jepa.exporters.format import ExportFormat, clip_input, quoted, unsupported


def write(encoder: Any, folder: Path) -> None:
    if not hasattr(encoder, "node"):
        raise unsupported("safetensors", encoder, "it has no `node` to build it from, as jepa.load_encoder sets it")
    write_encoder(folder, encoder)


def snippet(encoder: Any, location: str) -> str:
    shape = ", ".join(map(str, clip_input(encoder)))
    kind = "images" if encoder.clip_shape[1] == 1 else "clips"
    return f"""\
import torch
from jepa import load_encoder
encoder = load_encoder({quoted(location)})
{kind} = torch.randint(0, 256, (2, {shape}), dtype=torch.uint8)  # of any size
pixels = encoder.transform({kind})
tokens = encoder(pixels)  # [2, {encoder.grid.num_tokens}, {encoder.embed_dim}]"""


def notes(encoder: Any) -> list[str]:
    return ["Loading it needs `pip install jepa-train`; train it further with `encoder=pretrained encoder.weights=.`"]


FORMAT = ExportFormat("jepa-train", write, open_encoder, snippet, clip_input, notes, "hf:{}")
