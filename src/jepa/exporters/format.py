"""The interface of an export format, and functions that several formats share."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor, nn

from jepa.errors import ConfigError, RunError
from jepa.layers.stems import PixelStem

EncodeFn = Callable[[Tensor], Tensor]
"""Normalised pixels [B, *input_shape] -> tokens [B, N, D]."""


class ExportFormat(NamedTuple):
    """How an encoder is written for one library and loaded from there."""

    library: str
    """Name of the library on the Hugging Face hub."""
    write: Callable[[Any, Path], None]
    """Write an encoder into an empty folder; raises ConfigError for an encoder that the format does not support."""
    load: Callable[[Path], EncodeFn]
    """Load the encoder as a user of the library does."""
    snippet: Callable[[Any, str], str]
    """(encoder, folder) -> a Python program that loads the encoder and computes `tokens`."""
    input_shape: Callable[[Any], tuple[int, ...]]
    """Shape of one input: (C, H, W) or (C, T, H, W)."""
    notes: Callable[[Any], list[str]]
    """Hints for the model card."""
    on_hub: str | None = None
    """Pattern of the source that loads repository {} of the hub in `snippet`; None if the library cannot."""


def clip_input(encoder: Any) -> tuple[int, ...]:
    """(C, T, H, W) for an encoder of clips, (C, H, W) for one of images."""
    channels, frames, height, width = encoder.clip_shape
    return (channels, frames, height, width) if frames > 1 else (channels, height, width)


def image_input(encoder: Any) -> tuple[int, ...]:
    channels, _, height, width = encoder.clip_shape
    return channels, height, width


def frame_notes(encoder: Any) -> list[str]:
    """The hint that an image encoder was trained on clips, if it was."""
    return ["It was trained on frames of clips, each encoded by itself."] if encoder.clip_shape[1] > 1 else []


def pixel_statistics(encoder: Any) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, for pixels in [0, 1]."""
    normalise = encoder.transform.normalise
    return list(normalise.mean), list(normalise.std)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def quoted(text: str) -> str:
    """A string literal in double quotes."""
    return json.dumps(text, ensure_ascii=False)


def require(module: str, extra: str = "export") -> ModuleType:
    """Import an optional package; raises RunError with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise
        raise RunError(f"{module} is not installed: pip install 'jepa-train[{extra}]'") from error


def mlp_width(format: str, encoder: Any) -> int:
    """Hidden width of the blocks. Raises ConfigError for an encoder that `format` has no model of."""
    if not isinstance(getattr(encoder, "stem", None), PixelStem | None):
        reason = "its models have no encoder.stem but linear; use safetensors, onnx or torch_export"
        raise unsupported(format, encoder, reason)
    if not len(encoder.blocks):
        raise unsupported(format, encoder, "it has no blocks (encoder.depth=0); use onnx or torch_export")
    return encoder.blocks[0].mlp.fc1.out_features


def unsupported(format: str, encoder: nn.Module, reason: str) -> ConfigError:
    return ConfigError([f"format={format} does not support {type(encoder).__name__}: {reason}"])
