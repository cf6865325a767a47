"""What one format of an exported encoder consists of, and what several of them share."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor, nn

from jepa.errors import ConfigError, RunError

Run = Callable[[Tensor], Tensor]
"""Normalised pixels [B, C, T, H, W], or [B, C, H, W] where `input_shape` says so -> tokens [B, N, D]."""


class ExportFormat(NamedTuple):
    """How one library takes an encoder. `write` raises ConfigError for an encoder that it cannot take."""

    library: str
    """its name on the Hugging Face hub"""
    write: Callable[[Any, Path], None]
    """the files of an encoder into an empty folder"""
    load: Callable[[Path], Run]
    """what others compute from these files, without our code"""
    snippet: Callable[[Any, str], str]
    """a program for an encoder that lies in this folder; it makes `tokens`"""
    input_shape: Callable[[Any], tuple[int, ...]]
    """shape of one input: (C, H, W) or (C, T, H, W)"""
    notes: Callable[[Any], list[str]]
    """what a user has to know, for the model card"""
    on_hub: str | None = None
    """what `snippet` takes instead of a folder to load repository {} of the hub; None where it cannot"""


def clip_input(encoder: Any) -> tuple[int, ...]:
    """Clips where the encoder was trained on some, else images."""
    channels, frames, height, width = encoder.clip_shape
    return (channels, frames, height, width) if frames > 1 else (channels, height, width)


def image_input(encoder: Any) -> tuple[int, ...]:
    channels, _, height, width = encoder.clip_shape
    return channels, height, width


def pixel_statistics(encoder: Any) -> tuple[list[float], list[float]]:
    """-> mean and standard deviation of pixels in [0, 1], of each channel"""
    normalise = encoder.transform.normalise
    return list(normalise.mean), list(normalise.std)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def quoted(text: str) -> str:
    """As a string in a program."""
    return json.dumps(text, ensure_ascii=False)


def require(module: str, extra: str = "export") -> ModuleType:
    """An optional package, or a RunError that names the extra it comes with."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise
        raise RunError(f"{module} is not installed: pip install 'jepa-train[{extra}]'") from error


def unsupported(format: str, encoder: nn.Module, reason: str) -> ConfigError:
    return ConfigError([f"format={format} cannot take {type(encoder).__name__}: {reason}"])
