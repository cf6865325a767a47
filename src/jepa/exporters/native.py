"""Our own folder: config.json and model.safetensors, which `jepa.load_encoder` opens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jepa.encoders.pretrained import open_encoder
from jepa.encoders.published import write_encoder
from jepa.exporters.format import ExportFormat, Run, clip_input, quoted, unsupported


def write(encoder: Any, folder: Path) -> None:
    if not hasattr(encoder, "node"):
        raise unsupported(
            "safetensors", encoder, "it was not opened by jepa.load_encoder, so nothing tells how to build it"
        )
    write_encoder(folder, encoder)


def load(folder: Path) -> Run:
    return open_encoder(folder)


def snippet(encoder: Any, where: str) -> str:
    shape = ", ".join(map(str, clip_input(encoder)))
    kind = "images" if encoder.clip_shape[1] == 1 else "clips"
    return f"""\
import torch
from jepa import load_encoder
encoder = load_encoder({quoted(where)})
{kind} = torch.randint(0, 256, (2, {shape}), dtype=torch.uint8)  # of any size
pixels = encoder.transform({kind})
tokens = encoder(pixels)  # [2, {encoder.grid.num_tokens}, {encoder.embed_dim}]"""


def notes(encoder: Any) -> list[str]:
    return [
        "It is loaded by `pip install jepa-train`, and goes on training with `encoder=pretrained encoder.weights=.`"
    ]


FORM = ExportFormat("jepa-train", write, load, snippet, clip_input, notes, "hf:{}")
