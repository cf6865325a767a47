"""Exports an encoder for other tools: a folder with its files, a model card and a program that loads it.

The files are loaded as the other tool would load them, and their tokens are compared, before they replace older ones.
"""

from __future__ import annotations

import os
import pkgutil
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import nn

from jepa.config.command_rules import FORMATS, overwrite_error
from jepa.encoders.pretrained import open_encoder
from jepa.errors import ConfigError, RunError, as_config_errors
from jepa.exporters.card import Provenance, card, read_provenance
from jepa.exporters.format import ExportFormat

IMPLEMENTATIONS = {
    "safetensors": "native:FORMAT", "timm": "timm:FORMAT", "transformers": "transformers:FORMAT", "onnx": "graphs:ONNX",
    "torch_export": "graphs:PROGRAM",
}  # fmt: skip
"""Format -> module of jepa.exporters and name of its ExportFormat."""
TOLERANCE = 1e-4
"""Largest allowed difference of tokens, relative to their largest value; rounding of float32 stays far below."""


class Exported(NamedTuple):
    """A finished export."""

    folder: Path
    difference: float
    """Largest absolute difference of a token value from the encoder, on random input."""
    largest: float
    """Largest absolute token value on that input."""
    snippet: str
    """A program that loads the encoder; its path is relative to the current folder if possible."""


def export_encoder(
    encoder: nn.Module | str | os.PathLike, format: str, folder: str | os.PathLike, *, repository: str | None = None
) -> Exported:
    """Write an encoder, or what `jepa.load_encoder` opens, into `folder`: completely, or not at all.

    `format` is safetensors (for `jepa.load_encoder`), timm, transformers, onnx or torch_export. A module that
    `load_encoder` has not opened needs a `transform` attribute. `repository`, OWNER/NAME on the Hugging Face hub,
    appears in the model card. Raises ConfigError if the format does not support the encoder or the folder holds
    something else, RunError if a package is missing or the exported encoder computes other tokens.
    """
    target = Path(folder).expanduser()
    if format not in FORMATS:
        raise ConfigError([f"format={format}: no such format; valid: {', '.join(FORMATS)}"])
    if reason := overwrite_error(target):
        raise ConfigError([f"output={target}: {reason}"])
    encoder, provenance = _open(encoder)
    implementation = export_format(format)
    temporary = target.with_name(f".writing-{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        implementation.write(encoder, temporary)
        difference, largest = compare(encoder, implementation, temporary)
        if not difference <= TOLERANCE * largest:
            raise RunError(
                f"format={format}: the tokens of the exported encoder differ by up to {difference:.2g}, of values up "
                f"to {largest:.2g} (allowed: {TOLERANCE:g} of the largest value); nothing was kept"
            )
        text = card(encoder, implementation, provenance, difference, repository)
        (temporary / "README.md").write_text(text, encoding="utf-8")
        _replace(target, temporary)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{target} cannot be written ({error}): fix this or give another output=") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Exported(target, difference, largest, implementation.snippet(encoder, _relative(target)))


def _open(encoder: nn.Module | str | os.PathLike) -> tuple[Any, Provenance]:
    if isinstance(encoder, nn.Module):
        return encoder.eval(), Provenance(type(encoder).__name__, {"weights": "module in memory"}, "")
    source = os.fspath(encoder)
    with as_config_errors(f"run={source}: "):
        return open_encoder(source), read_provenance(source)


def export_format(format: str) -> ExportFormat:
    """The implementation of a format; imports its library."""
    return pkgutil.resolve_name(f"jepa.exporters.{IMPLEMENTATIONS[format]}")


@torch.no_grad()
def compare(encoder: Any, implementation: ExportFormat, folder: Path) -> tuple[float, float]:
    """Largest absolute difference and value of tokens, over random batches of one and three."""
    exported = implementation.load(folder)
    generator = torch.Generator().manual_seed(0)
    difference = largest = 0.0
    for batch_size in (1, 3):
        pixels = torch.randn(batch_size, *implementation.input_shape(encoder), generator=generator)
        ours, theirs = encoder(pixels), exported(pixels)
        if ours.shape != theirs.shape:
            raise RunError(f"the exported encoder returns tokens {tuple(theirs.shape)} instead of {tuple(ours.shape)}")
        difference = max(difference, (ours - theirs).abs().max().item())
        largest = max(largest, ours.abs().max().item())
    return difference, largest


def _replace(target: Path, complete: Path) -> None:
    """Move a complete export to `target`, then delete the earlier one."""
    previous = target.with_name(f".before-{target.name}")
    shutil.rmtree(previous, ignore_errors=True)
    if target.exists():
        target.rename(previous)
    complete.rename(target)
    shutil.rmtree(previous, ignore_errors=True)


def _relative(folder: Path) -> str:
    """The path relative to the current folder if it is below, else the absolute path."""
    path = folder.absolute()
    return (path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path).as_posix()


def push_to_hub(folder: Path, repository: str) -> str:
    """Upload an export to OWNER/NAME on the Hugging Face hub, private if new; returns its address."""
    import httpx
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Export with jepa-export")
    except (OSError, httpx.HTTPError) as error:
        reason = " ".join(str(error).split("\n")[0].split()) or type(error).__name__
        raise RunError(
            f"push_to_hub={repository}: the upload failed ({reason}); {folder} is complete: "
            f"go online, run `hf auth login` and then `hf upload {repository} {folder}`"
        ) from error
    return str(address)
