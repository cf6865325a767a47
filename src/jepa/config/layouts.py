"""What a folder of files is: which part is trained on, which is held out, which folders are classes. Without torch."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from jepa.config.catalogue import components
from jepa.config.paths import content

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".npy")
VIDEO_SUFFIXES = (".mp4", ".mkv", ".avi", ".mov", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".ogv", ".3gp")
VALIDATION_NAMES = ("validation", "valid", "val", "test", "testing", "dev")
"""Names of a folder or split that is used as the held-out part if none is named, in this order."""
TRAINING_NAMES = ("train", "training")
MAX_DEPTH = 8
"""Folders below one another that are searched for a first file."""
MAX_CLASSES = 50
"""Class folders whose sub-folders are compared."""


def choose_folders(config: Mapping[str, Any]) -> Iterator[str]:
    """Set `image_folder` and `video_folder` where they are null and `root_path` exists; an error for what is ambiguous.

    The chosen folder is part of the configuration, so that a run keeps it.
    """
    for path, node in components(config):
        root = node.get("root_path")
        keys = [key for key in ("image_folder", "video_folder") if node.get(key, "") is None]
        if not keys or not isinstance(root, str) or not os.path.isdir(os.path.expanduser(root)):
            continue
        suffixes = VIDEO_SUFFIXES if keys == ["video_folder"] else IMAGE_SUFFIXES
        has_classes = "class_level" in node and not node.get("annotations")
        try:
            folder = find_training(Path(root).expanduser(), suffixes, f"{path}.{keys[0]}", has_classes=has_classes)
            if has_classes and node["class_level"] is None:
                refuse_two_levels(Path(root).expanduser() / folder, suffixes, f"{path}.class_level")
            node[keys[0]] = folder  # pyright: ignore[reportIndexIssue]
        except ValueError as error:
            yield f"{path}.root_path={root}: {error}"


def find_training(root: Path, suffixes: tuple[str, ...], key: str, *, has_classes: bool = True) -> str:
    """The folder in `root` whose files are trained on: its training part, or else `root` itself, as ".".

    With classes, a folder that holds nothing but another folder is opened, too. Raises ValueError if there are no
    files, or if more than one folder may be meant; `key` is the key that chooses one.
    """
    folder = part = _training_part(root, suffixes, key)
    while has_classes and not _has_loose_files(folder, suffixes):
        inner = _folders_with_files(folder, suffixes)
        if not inner:
            raise ValueError(no_files(folder, suffixes))
        if len(inner) > 1:
            break
        folder /= inner[0]
        part = folder
    return part.relative_to(root).as_posix()


def _training_part(root: Path, suffixes: tuple[str, ...], key: str) -> Path:
    names = _folders_with_files(root, suffixes)
    kinds = {kind: [name for name in names if part_of(name) == kind] for kind in ("train", "held out", "")}
    training, held_out, others = kinds.values()
    if len(training) > 1 or (held_out and not training and not others and not _has_loose_files(root, suffixes)):
        choices = ", ".join(f"{key}={name}" for name in training or held_out)
        raise ValueError(f"{content(root)}; choose the part to train on: {choices}")
    flat = [name for name in others if _has_loose_files(root / name, suffixes)]
    is_class = training and flat and not _folders_with_files(root / training[0], suffixes)
    if is_class or (held_out and not training and len(others) > 1):
        name = (training or held_out)[0]
        part = f"{key}={name} trains on this folder alone" if training else "else put the classes into a folder train"
        raise ValueError(f"{name} may be a class or a part; {key}=. takes each folder as a class, {part}")
    if held_out and len(others) == 1:
        return root / others[0]
    return root / training[0] if training else root


def no_files(folder: Path, suffixes: tuple[str, ...]) -> str:
    kind = "videos" if suffixes == VIDEO_SUFFIXES else "images"
    return f"no {kind} ({' '.join(suffixes)}) in {folder} or its sub-folders; {content(folder)}"


def refuse_two_levels(folder: Path, suffixes: tuple[str, ...], key: str) -> None:
    """Raises ValueError if sub-folders of the same names lie in several folders: either may be the classes."""
    inner: Counter[str] = Counter()
    outer = list(islice(_folders(folder), MAX_CLASSES))
    for name in outer:
        if _has_loose_files(folder / name, suffixes):
            return
        inner.update(_folders_with_files(folder / name, suffixes))
    repeated = sorted(name for name, count in inner.items() if count > 1)
    if len(repeated) > 1:
        tops, names = ", ".join(outer[:3]), ", ".join(repeated[:3])
        raise ValueError(
            f"the classes may be the folders {tops} or the folders {names} in them: {key}=1 takes the outer, {key}=2 "
            f"the inner ones, {key}=0 all files without classes"
        )


def part_of(name: str) -> str:
    """ "train" or "held out" if the name of a folder says that it is such a part, as seg_train; else ""."""
    words = {*re.findall("[a-z]+", name.casefold())}
    return "train" if words & {*TRAINING_NAMES} else "held out" if words & {*VALIDATION_NAMES} else ""


def held_out_folders(folder: Path, root: Path) -> list[Path]:
    """Folders beside the training part, or beside a folder in `root` that holds it, whose name says held out.

    Beside `root` itself only if that is a training part by its name.
    """
    inside = [parent for parent in (folder, *folder.parents) if parent != root and parent.is_relative_to(root)]
    if not inside and part_of(root.name) == "train":
        inside = [root]
    beside = [parent.parent / name for parent in inside for name in _folders(parent.parent) if parent.name != name]

    def order(path: Path) -> int:
        words = re.findall("[a-z]+", path.name.casefold())
        return min(VALIDATION_NAMES.index(word) for word in words if word in VALIDATION_NAMES)

    return sorted((path for path in beside if part_of(path.name) == "held out"), key=order)


def _folders(folder: Path) -> list[str]:
    """The names of the visible sub-folders, in order."""
    try:
        return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    except OSError:
        return []


def _folders_with_files(folder: Path, suffixes: tuple[str, ...]) -> list[str]:
    return [name for name in _folders(folder) if holds_files(folder / name, suffixes)]


def _has_loose_files(folder: Path, suffixes: tuple[str, ...]) -> bool:
    try:
        names = (entry.name for entry in os.scandir(folder) if not entry.name.startswith("."))
        return any(name.lower().endswith(suffixes) for name in names)
    except OSError:
        return False


def holds_files(folder: Path, suffixes: tuple[str, ...], depth: int = MAX_DEPTH) -> bool:
    """True if a file with one of the suffixes is in the folder, or at most `depth` folders below."""
    if _has_loose_files(folder, suffixes):
        return True
    return depth > 0 and any(holds_files(folder / name, suffixes, depth - 1) for name in _folders(folder))
