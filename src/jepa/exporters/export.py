"""Gives the weights of an encoder to other tools: a folder with its files, a model card, and a program that loads them.

What is written is opened again as others would open it, and compared with our encoder, before anybody sees it.
"""

from __future__ import annotations

import importlib
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import nn

from jepa.config.command_rules import FORMATS, why_not
from jepa.encoders.pretrained import open_encoder
from jepa.errors import ConfigError, RunError
from jepa.exporters.card import Provenance, card, history_of
from jepa.exporters.format import ExportFormat

HOMES = {
    "safetensors": ("native", "FORM"),
    "timm": ("timm", "FORM"),
    "transformers": ("transformers", "FORM"),
    "onnx": ("graphs", "ONNX"),
    "torch_export": ("graphs", "PROGRAM"),
}
"""Format -> the module of jepa.exporters that knows it, and the name of its Form there"""
TOLERANCE = 1e-4
"""largest difference of tokens, as a share of their largest value; float32 sums in another order stay far below"""


class Exported(NamedTuple):
    """What was written."""

    folder: Path
    files: dict[str, int]
    """name -> bytes"""
    difference: float
    """the largest from our encoder, on random input"""
    largest: float
    """absolute value of a token there"""
    snippet: str
    """a program that loads the encoder from the folder, seen from where we are"""


def export_encoder(
    encoder: nn.Module | str | os.PathLike,
    format: str,
    folder: str | os.PathLike,
    *,
    repository: str | None = None,
) -> Exported:
    """Write an encoder, or what `jepa.load_encoder` opens, into `folder`: whole, or not at all.

    `format` is safetensors (for `jepa.load_encoder`), timm, transformers, onnx or torch_export. A module that was not
    opened by us needs the `transform` of `load_encoder`. `repository` is OWNER/NAME on the Hugging Face hub, where the
    card will be read. Raises ConfigError for a format that cannot take the encoder and for a folder that holds
    something else, RunError where a package is missing or what was written does not compute what our encoder does.
    """
    target = Path(folder).expanduser()
    if format not in FORMATS:
        raise ConfigError([f"format={format}: no such format; valid: {', '.join(FORMATS)}"])
    if reason := why_not(target):
        raise ConfigError([f"output={target}: {reason}"])
    opened, history = _opened(encoder)
    form = form_of(format)
    temporary = target.with_name(f".writing-{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        form.write(opened, temporary)
        difference, largest = compare(opened, form, temporary)
        if not difference <= TOLERANCE * largest:
            raise RunError(
                f"format={format}: what was written gives tokens that differ by {difference:.2g} from those of our "
                f"encoder, of values up to {largest:.2g} (allowed: a share of {TOLERANCE:g}); nothing was kept"
            )
        text = card(opened, form, history, difference, repository)
        (temporary / "README.md").write_text(text, encoding="utf-8")
        _replace(target, temporary)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{target} cannot be written ({error}): mend this or give another output=") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    files = {path.name: path.stat().st_size for path in sorted(target.iterdir())}
    return Exported(target, files, difference, largest, form.snippet(opened, _seen_from_here(target)))


def _opened(encoder: nn.Module | str | os.PathLike) -> tuple[Any, Provenance]:
    if isinstance(encoder, nn.Module):
        return encoder.eval(), Provenance(type(encoder).__name__, {"weights": "of a module in memory"}, "")
    source = os.fspath(encoder)
    try:
        return open_encoder(source), history_of(source)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError([f"run={source}: {error}"]) from error


def form_of(format: str) -> ExportFormat:
    """What knows a format; only now is its library imported."""
    module, name = HOMES[format]
    return getattr(importlib.import_module(f"jepa.exporters.{module}"), name)


@torch.no_grad()
def compare(encoder: Any, form: ExportFormat, folder: Path) -> tuple[float, float]:
    """-> largest difference and largest value of tokens, of batches of one and of three random inputs"""
    run = form.load(folder)
    generator = torch.Generator().manual_seed(0)
    difference = largest = 0.0
    for batch_size in (1, 3):
        pixels = torch.randn(batch_size, *form.input_shape(encoder), generator=generator)
        ours, theirs = encoder(pixels), run(pixels)
        if ours.shape != theirs.shape:
            raise RunError(f"what was written gives tokens {tuple(theirs.shape)} instead of {tuple(ours.shape)}")
        difference = max(difference, (ours - theirs).abs().max().item())
        largest = max(largest, ours.abs().max().item())
    return difference, largest


def _replace(target: Path, whole: Path) -> None:
    """An earlier export goes once the new one is in its place."""
    before = target.with_name(f".before-{target.name}")
    shutil.rmtree(before, ignore_errors=True)
    if target.exists():
        target.rename(before)
    whole.rename(target)
    shutil.rmtree(before, ignore_errors=True)


def _seen_from_here(folder: Path) -> str:
    """Relative where it lies below the current folder."""
    absolute, here = folder.absolute(), Path.cwd()
    return absolute.relative_to(here).as_posix() if absolute.is_relative_to(here) else absolute.as_posix()


def push_to_hub(folder: Path, repository: str) -> str:
    """Put an export into a repository OWNER/NAME of the Hugging Face hub; a new one is private. -> its address"""
    import httpx
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Export with jepa-export")
    except (OSError, httpx.HTTPError) as error:
        reason = " ".join(str(error).split("\n")[0].split()) or type(error).__name__
        raise RunError(
            f"push_to_hub={repository}: the hub could not be written ({reason}); {folder} is whole: "
            f"once you are online and have run `hf auth login`, `hf upload {repository} {folder}`"
        ) from error
    return str(address)
