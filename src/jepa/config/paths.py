"""Sources of weights and data, recognised by names and small files, without torch."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from jepa.config import checkpoints
from jepa.config.files import Fields, as_mapping, read_json
from jepa.types import Positive, PositiveInt

ENCODER_FORMAT = "jepa-train encoder 1"
"""`format` in the config.json of an encoder exported as safetensors."""
MODELS = ("ijepa", "vjepa2")
"""Supported values of `model_type` in the config.json of transformers."""
EXPECTED = (
    "expected a run or checkpoint of jepa-train, a folder of jepa-export or of transformers (ijepa or vjepa2), a file "
    "of I-JEPA or V-JEPA (.pth.tar, .pt), hf:ORG/NAME or timm:NAME"
)

CLIP_SHAPE = tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt]
"""Type of (C, T, H, W) in a file."""
_SIZES = ("crop_size", "frames_per_clip", "num_channels", "in_chans", "num_attention_heads")
TRANSFORMERS_FIELDS: Fields = {
    "model_type": Literal["ijepa", "vjepa2"],
    "hidden_act": str | None,
    "qkv_bias": bool | None,
    "layer_norm_eps": Positive | None,  # pyright: ignore[reportOperatorIssue]
    "image_size": PositiveInt | tuple[PositiveInt, PositiveInt] | None,  # pyright: ignore[reportOperatorIssue]
    **dict.fromkeys(_SIZES, PositiveInt | None),
}
"""Fields of the config.json of transformers that are read."""


class Source(NamedTuple):
    kind: str
    """run, exported, transformers, file, hub or timm"""
    location: str
    """a path; for hub ORG/NAME; for timm the name that `timm.create_model` takes"""

    def __str__(self) -> str:
        return {"hub": "hf:", "timm": "timm:"}.get(self.kind, "") + self.location


def find_source(text: str) -> Source:
    """The source that a name or path stands for. Raises ValueError with what exists and what was expected."""
    if text.startswith("timm:"):
        return _timm(text.removeprefix("timm:"))
    if text.startswith("hf:"):
        name = text.removeprefix("hf:")
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            raise ValueError(f"{text} is no name on the hub; expected hf:ORG/NAME")
        return Source("hub", name)
    path = Path(text).expanduser()
    if os.path.isdir(path):
        return _folder(path)
    if os.path.islink(path) and not os.path.exists(path):
        raise ValueError(f"{path.absolute()} is a link to {os.readlink(path)}, which does not exist")
    if not os.path.exists(path):
        raise ValueError(f"{path.absolute()} does not exist; {EXPECTED}")
    return Source("file", str(path))


def shape_of(source: Source) -> tuple[int, int, int, int] | None:
    """(C, T, H, W) of the training clips; None if no small file holds it. Raises ValueError for an unreadable file."""
    path = Path(source.location)
    if source.kind == "run":
        checkpoint = checkpoints.locate(path)
        state = read_json(checkpoint / "state.json", {"clip_shape": CLIP_SHAPE}) if checkpoint else {}
        return tuple(state["clip_shape"]) if state else None
    config_file = path / "config.json"
    if source.kind == "exported":
        node = read_json(config_file, {"encoder": dict})["encoder"]
        return tuple(as_mapping(node, f"{config_file}: encoder", {"clip_shape": CLIP_SHAPE})["clip_shape"])
    if source.kind != "transformers":
        return None
    config = read_json(config_file, TRANSFORMERS_FIELDS)
    size = config.get("image_size") or config.get("crop_size") or 224
    height, width = size if isinstance(size, list) else (size, size)
    channels = config.get("num_channels") or config.get("in_chans") or 3
    return channels, config.get("frames_per_clip") or 1, height, width


def _timm(name: str) -> Source:
    if name.startswith("local-dir:"):
        path = Path(name.removeprefix("local-dir:")).expanduser()
        if not (path / "config.json").is_file() or "architecture" not in read_json(path / "config.json"):
            raise ValueError(f"{path.absolute()} is no folder of timm: no config.json in it names an architecture")
        return Source("timm", f"local-dir:{path}")
    if not re.fullmatch(r"(hf-hub:[\w.-]+/)?[\w.-]+(@[\w.-]+)?", name):
        expected = "timm:NAME, timm:local-dir:FOLDER or timm:hf-hub:ID"
        raise ValueError(f"timm:{name} names no model of timm; expected {expected}")
    return Source("timm", name)


def _folder(path: Path) -> Source:
    if any((path / name).exists() for name in ("state.json", "checkpoints", "run.json")):
        return Source("run", str(path))
    if not (path / "config.json").is_file():
        raise ValueError(f"{path.absolute()} holds no known weights; {EXPECTED}")
    config = read_json(path / "config.json")
    if config.get("format") == ENCODER_FORMAT:
        return Source("exported", str(path))
    if config.get("model_type") in MODELS:
        return Source("transformers", str(path))
    if "architecture" in config:
        raise ValueError(f"{path.absolute()} is a folder of timm; write timm:local-dir:{path}")
    what = f"model_type={config['model_type']}" if "model_type" in config else "no model_type"
    raise ValueError(f"{path / 'config.json'} says {what}; {EXPECTED}")


def existing(path: Path, key: str, kind: str = "") -> Path:
    """The path; `kind` "folder" accepts only folders. Raises ValueError with `key` and the contents of the parent."""
    if os.path.isdir(path) if kind else os.path.exists(path):
        return path
    raise ValueError(f"{key}: there is no {f'{kind} {path}'.strip()}; {content(path)}")


def content(path: Path) -> str:
    """Text with the contents of a folder or, if it does not exist, of its nearest existing parent."""
    folder = next(parent for parent in (path, *path.parents) if os.path.isdir(parent))
    names = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir() if not entry.name.startswith("."))
    listing = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return f"{folder} holds {listing or 'nothing'}"


def on_this_machine(text: str) -> Path | None:
    """An existing path; None for a name on the hub. Raises ValueError, without key and value, for anything else."""
    path = Path(text).expanduser().absolute()
    if os.path.exists(path):
        return path
    if text.startswith((".", "/", "~")) or text.endswith(".parquet") or text.count("/") > 1:
        raise ValueError(f"there is no {path}; {content(path)}")
    return None


def find_shards(pattern: str) -> list[Path]:
    """Absolute paths of `train-{000..146}.tar`, a glob, the .tar files of a folder, or one file; each once.

    Raises ValueError with a sentence that has neither key nor value.
    """
    paths = [Path(name).expanduser().absolute() for name in expand_braces(pattern)]
    shards = list(dict.fromkeys(file for path in paths for file in _files(path)))
    missing = [path for path in shards if not path.is_file()]
    if missing:
        count = f" ({len(missing)} of {len(shards)} are missing)" if len(shards) > 1 else ""
        raise ValueError(f"there is no {missing[0]}{count}")
    if not shards:
        raise ValueError("no .tar file is there")
    if others := [path for path in shards if path.suffix != ".tar"]:
        raise ValueError(f"{others[0]} is no .tar; unpack compressed files (gunzip), their samples cannot be read")
    return shards


def expand_braces(pattern: str) -> Iterator[str]:
    """Brace expansion as in a shell, for {a,b} and {00..12}."""
    braces = re.search(r"\{([^{}]*)\}", pattern)
    if braces is None:
        yield pattern
        return
    choices = braces[1].split(",")
    if bounds := re.fullmatch(r"(\d+)\.\.(\d+)", braces[1]):
        first, last = bounds.groups()
        width = max(len(first), len(last)) if first.startswith("0") else 0
        choices = [str(number).zfill(width) for number in range(int(first), int(last) + 1)]
    for choice in choices:
        yield from expand_braces(f"{pattern[: braces.start()]}{choice}{pattern[braces.end() :]}")


def _files(path: Path) -> list[Path]:
    if any(sign in str(path) for sign in "*?["):
        return sorted(map(Path, glob.glob(str(path), recursive=True)))
    return sorted(path.glob("*.tar")) if path.is_dir() else [path]
