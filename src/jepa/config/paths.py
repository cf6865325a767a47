"""Where weights and data can be read from, told by names and small files, without torch."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from jepa.config.files import Fields, as_mapping, read_json

ENCODER_FORMAT = "jepa-train encoder 1"
"""`format` in the config.json of an encoder that was exported as safetensors."""
MODELS = ("ijepa", "vjepa2")
"""`model_type` in the config.json of transformers."""
EXPECTED = (
    "expected a run or checkpoint of jepa-train, a folder of jepa-export or of transformers (ijepa or vjepa2), a file "
    "of I-JEPA or V-JEPA (.pth.tar, .pt), hf:ORG/NAME or timm:NAME"
)

CLIP_SHAPE = "tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt]"
OF_TRANSFORMERS: Fields = {
    "model_type": f"Literal{list(MODELS)}",
    "hidden_act": "str | None",
    "qkv_bias": "bool | None",
    "layer_norm_eps": "Positive | None",
    "image_size": "PositiveInt | tuple[PositiveInt, PositiveInt] | None",
    **dict.fromkeys(("crop_size", "frames_per_clip", "num_channels", "in_chans"), "PositiveInt | None"),
    "num_attention_heads": "PositiveInt | None",
}
"""What is read in the config.json of transformers."""


class Source(NamedTuple):
    kind: str
    """run, exported, transformers, file, hub or timm"""
    place: str
    """a path; of the hub ORG/NAME; of timm what `timm.create_model` takes"""

    def __str__(self) -> str:
        return {"hub": "hf:", "timm": "timm:"}.get(self.kind, "") + self.place


def find_source(text: str) -> Source:
    """What a name or path stands for. Raises ValueError with what is there and what was expected."""
    if text.startswith("timm:"):
        return _timm(text.removeprefix("timm:"))
    if text.startswith("hf:"):
        name = text.removeprefix("hf:")
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            raise ValueError(f"{text} is no name on the hub; expected hf:ORG/NAME")
        return Source("hub", name)
    path = Path(text).expanduser()
    if path.is_dir():
        return _folder(path)
    if not path.exists():
        raise ValueError(f"{path.absolute()} does not exist; {EXPECTED}")
    return Source("file", str(path))


def shape_of(source: Source) -> tuple[int, int, int, int] | None:
    """(C, T, H, W) of the clips that it was trained on; None where only the weights, or nobody, would tell.

    Raises ValueError where a file that should tell cannot be read.
    """
    place = Path(source.place)
    if source.kind == "run":
        states = (folder / "state.json" for folder in (place, place / "checkpoints" / "last"))
        found = next((path for path in states if path.is_file()), None)
        return tuple(read_json(found, {"clip_shape": CLIP_SHAPE})["clip_shape"]) if found else None
    config_file = place / "config.json"
    if source.kind == "exported":
        node = read_json(config_file, {"encoder": "dict"})["encoder"]
        return tuple(as_mapping(node, f"{config_file}: encoder", {"clip_shape": CLIP_SHAPE})["clip_shape"])
    if source.kind != "transformers":
        return None
    config = read_json(config_file, OF_TRANSFORMERS)
    size = config.get("image_size") or config.get("crop_size") or 224
    height, width = size if isinstance(size, list) else (size, size)
    channels = config.get("num_channels") or config.get("in_chans") or 3
    return channels, config.get("frames_per_clip") or 1, height, width


def _timm(name: str) -> Source:
    if name.startswith("local-dir:"):
        path = Path(name.removeprefix("local-dir:")).expanduser()
        if not (path / "config.json").is_file() or "architecture" not in read_json(path / "config.json"):
            raise ValueError(
                f"{path.absolute()} is no folder of timm: it has no config.json that names an architecture"
            )
        return Source("timm", f"local-dir:{path}")
    if not re.fullmatch(r"(hf-hub:[\w.-]+/)?[\w.-]+(@[\w.-]+)?", name):
        raise ValueError(
            f"timm:{name} names no model of timm; expected timm:NAME, timm:local-dir:FOLDER or timm:hf-hub:ID"
        )
    return Source("timm", name)


def _folder(path: Path) -> Source:
    if any((path / name).exists() for name in ("state.json", "checkpoints", "run.json")):
        return Source("run", str(path))
    if not (path / "config.json").is_file():
        raise ValueError(f"{path.absolute()} holds no weights that are known here; {EXPECTED}")
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
    """The path, of the `kind` "folder" or any. Raises ValueError that begins with `key` and says what is there."""
    if path.is_dir() if kind else path.exists():
        return path
    raise ValueError(f"{key}: there is no {f'{kind} {path}'.strip()}; {content(path)}")


def content(path: Path) -> str:
    """What a folder holds; where it does not exist, the nearest one above it."""
    folder = next(parent for parent in (path, *path.parents) if parent.is_dir())
    names = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir() if not entry.name.startswith("."))
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return f"{folder} holds {shown or 'nothing'}"


def on_this_machine(text: str) -> Path | None:
    """A path that exists; None for a name on the hub, which has at most one slash and no dot in front.

    Raises ValueError, without key and value, for what is no such name.
    """
    path = Path(text).expanduser().absolute()
    if path.exists():
        return path
    if text.startswith((".", "/", "~")) or text.endswith(".parquet") or text.count("/") > 1:
        raise ValueError(f"there is no {path}; {content(path)}")
    return None


def find_shards(pattern: str) -> list[Path]:
    """The files of `train-{000..146}.tar`, of a glob, of a folder (its .tar), or one; absolute, each once.

    Raises ValueError with a sentence that has neither key nor value.
    """
    named = [Path(name).expanduser().absolute() for name in _expand(pattern)]
    found = list(dict.fromkeys(file for path in named for file in _files(path)))
    missing = [path for path in found if not path.is_file()]
    if missing:
        count = f" ({len(missing)} of {len(found)} are missing)" if len(found) > 1 else ""
        raise ValueError(f"there is no {missing[0]}{count}")
    if not found:
        raise ValueError("no .tar file is there")
    other = next((path for path in found if path.suffix != ".tar"), None)
    if other is not None:
        raise ValueError(f"{other} is no .tar; unpack what is compressed (gunzip), no sample can be read out of it")
    return found


def _expand(pattern: str) -> Iterator[str]:
    """Every {a,b} and {00..12} written out, as a shell does."""
    braces = re.search(r"\{([^{}]*)\}", pattern)
    if braces is None:
        yield pattern
        return
    bounds = re.fullmatch(r"(\d+)\.\.(\d+)", braces[1])
    for choice in _numbers(bounds[1], bounds[2]) if bounds else braces[1].split(","):
        yield from _expand(f"{pattern[: braces.start()]}{choice}{pattern[braces.end() :]}")


def _numbers(first: str, last: str) -> Iterator[str]:
    width = max(len(first), len(last)) if first.startswith("0") else 0
    return (str(number).zfill(width) for number in range(int(first), int(last) + 1))


def _files(path: Path) -> list[Path]:
    if any(sign in str(path) for sign in "*?["):
        return sorted(map(Path, glob.glob(str(path), recursive=True)))
    return sorted(path.glob("*.tar")) if path.is_dir() else [path]
