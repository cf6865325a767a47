"""What must hold between the keys of an export, and where it is written. Without torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from jepa.catalogue import suggestion
from jepa.checked import Checked, Rule
from jepa.sources import find_source

FORMATS = ("safetensors", "timm", "transformers", "onnx", "torch_export")

MARK = "<!-- written by jepa-export; a folder with this line is replaced when it is exported again -->"
"""a line of the README.md of every export"""

WRITTEN = {
    *("README.md", "config.json", "model.safetensors", "preprocessor_config.json", "video_preprocessor_config.json"),
    *("model.onnx", "model.onnx.data", "model.pt2"),
}
"""all that an export may consist of"""


def output_folder(run: str, format: str, output: str | None) -> Path | None:
    """Where to write: export/FORMAT in the run's folder unless `output` says so; None where there is no run folder."""
    if output is not None:
        return Path(output).expanduser()
    place = Path(run).expanduser()
    if (place / "checkpoints").is_dir():
        return place / "export" / format
    return place.parent.parent / "export" / format if place.parent.name == "checkpoints" else None


def why_not(folder: Path) -> str:
    """Why an export must not be written there; empty where nothing else would be lost."""
    if not folder.exists():
        return ""
    if not folder.is_dir():
        return f"{folder} is a file; give a folder that does not exist yet"
    found = {path.name for path in folder.iterdir()}
    if not found:
        return ""
    card = folder / "README.md"
    if card.is_file() and MARK in card.read_text(encoding="utf-8", errors="replace"):
        foreign = sorted(found - WRITTEN)
        return f"{folder} holds more than an export ({', '.join(foreign[:3])}); remove it" if foreign else ""
    return f"{folder} is not empty and not from jepa-export; give another folder"


def _format(checked: Checked) -> Iterator[str]:
    if (format := checked["format"]) not in FORMATS:
        yield f"{checked.show('format')}: no such format{suggestion(str(format), FORMATS)}; valid: {', '.join(FORMATS)}"


def _places(checked: Checked) -> Iterator[str]:
    """What is exported is an encoder, as far as names and small files tell, and nothing is lost where it goes."""
    format, run = checked["format"], str(checked["run"])
    try:
        find_source(run)
    except ValueError as error:
        yield f"{checked.show('run')}: {error}"
        return
    folder = output_folder(run, format, checked.get("output"))
    if folder is None:
        yield f"{checked.show('run')}: has no run folder to write into; give output=FOLDER"
    elif reason := why_not(folder):
        yield f"{checked.show('output') if 'output' in checked else 'output'}: {reason}"


def _hub(checked: Checked) -> Iterator[str]:
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", checked["push_to_hub"]):
        yield f"{checked.show('push_to_hub')}: takes OWNER/NAME of a repository on the Hugging Face hub"


OF_EXPORTS: tuple[Rule, ...] = (_format, _places, _hub)
