"""ONNX and torch.export: programs that need no model code, with a dynamic batch and a fixed image size."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from jepa.exporters.format import EncodeFn, ExportFormat, clip_input, pixel_statistics, quoted, require

ONNX_FILE, PROGRAM_FILE = "model.onnx", "model.pt2"


def write_onnx(encoder: Any, folder: Path) -> None:
    require("onnx")
    require("onnxscript")
    with _quietly():
        program = torch.onnx.export(_program(encoder), input_names=["pixels"], output_names=["tokens"], verbose=False)
    assert program is not None
    program.save(folder / ONNX_FILE)


def load_onnx(folder: Path) -> EncodeFn:
    session = require("onnxruntime").InferenceSession(folder / ONNX_FILE, providers=["CPUExecutionProvider"])
    return lambda pixels: torch.from_numpy(session.run(["tokens"], {"pixels": pixels.numpy()})[0])


def write_program(encoder: Any, folder: Path) -> None:
    with _quietly():
        torch.export.save(_program(encoder), folder / PROGRAM_FILE)


def load_program(folder: Path) -> EncodeFn:
    return torch.export.load(folder / PROGRAM_FILE).module()


def _program(encoder: Any) -> torch.export.ExportedProgram:
    example = torch.zeros(2, *clip_input(encoder))  # torch.export takes a batch of 1 for a constant
    program = torch.export.export(encoder, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it contains paths of this machine
    return program


@contextmanager
def _quietly() -> Iterator[None]:
    """Suppress the warnings and log messages of the exporters; errors are still raised."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(level)


def onnx_snippet(encoder: Any, location: str) -> str:
    mean, std = (_column(encoder, values) for values in pixel_statistics(encoder))
    shape = ", ".join(map(str, clip_input(encoder)))
    return f"""\
import numpy, onnxruntime
session = onnxruntime.InferenceSession({quoted(f"{location}/{ONNX_FILE}")})
pixels = numpy.random.rand(2, {shape})  # {_kind(encoder)} of any number, values from 0 to 1
pixels = ((pixels - {mean}) / {std}).astype("float32")
(tokens,) = session.run(["tokens"], {{"pixels": pixels}})  # [2, {encoder.grid.num_tokens}, {encoder.embed_dim}]"""


def program_snippet(encoder: Any, location: str) -> str:
    mean, std = (_column(encoder, values) for values in pixel_statistics(encoder))
    shape = ", ".join(map(str, clip_input(encoder)))
    return f"""\
import torch
encode = torch.export.load({quoted(f"{location}/{PROGRAM_FILE}")}).module()
pixels = torch.rand(2, {shape})  # {_kind(encoder)} of any number, values from 0 to 1
pixels = (pixels - torch.tensor({mean})) / torch.tensor({std})
tokens = encode(pixels)  # [2, {encoder.grid.num_tokens}, {encoder.embed_dim}]"""


def _kind(encoder: Any) -> str:
    return "images" if len(clip_input(encoder)) == 3 else "clips"


def _column(encoder: Any, values: list[float]) -> list[Any]:
    """Values [C] as nested lists [C, 1, ..., 1] that broadcast over the pixels."""
    column: list[Any] = values
    for _ in clip_input(encoder)[1:]:
        column = [[value] for value in column]
    return column


def notes(encoder: Any) -> list[str]:
    shape = ", ".join(map(str, clip_input(encoder)))
    axes = f"channels,{' frames,' * (len(clip_input(encoder)) == 4)} height, width"
    return [
        f"Input `pixels`: float32 [batch, {shape}] ({axes}), normalised as below. "
        "Output `tokens`: float32 [batch, tokens, width]. Only the batch size is variable."
    ]


ONNX = ExportFormat("onnx", write_onnx, load_onnx, onnx_snippet, clip_input, notes)
PROGRAM = ExportFormat("pytorch", write_program, load_program, program_snippet, clip_input, notes)
