"""What must hold between the keys of the data set and of its augmentation. Without torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from jepa.checked import Checked, Rule, not_divisible, pair_of
from jepa.shard_names import find_shards


def _ranges(checked: Checked) -> Iterator[str]:
    """Shares of an area and aspect ratios of the augmentation; those of masks are checked with the grid."""
    for key, upper in {"jitter": 2.5, "grayscale": 1, "blur": 1, "solarize": 1}.items():
        if not 0 <= checked.get(f"augment.{key}", 0) <= upper:
            yield f"{checked.show(f'augment.{key}')}: must be from 0 to {upper:g}"
    if checked.get("augment.grayscale", 0) > 0 and _is_grey(checked):
        yield f"{checked.show('augment.grayscale')}: the pictures are grey already; set it to 0"
    scales = {f"augment.{key}": 1.0 for key in ("crop_scale", "local_scale") if f"augment.{key}" in checked}
    for key, upper in (scales | {"augment.crop_aspect": float("inf")}).items():
        bounds = checked[key]
        if len(bounds) != 2 or not 0 < bounds[0] <= bounds[1] <= upper:
            limit = f" and at most {upper:g}" if upper < float("inf") else ""
            yield f"{checked.show(key)}: must be two numbers, the smaller first, above 0{limit}"


def _is_grey(checked: Checked) -> bool:
    return checked.get("dataset.channels", 3) != 3 or checked.get("dataset.name") in ("mnist", "fashion_mnist")


def _local(checked: Checked) -> Iterator[str]:
    """Smaller crops are cut into patches, and compared with the whole of the others."""
    if checked["augment.local_views"] < 1:
        return
    shown = checked.show("augment.local_views")
    if not checked["mask._target_"].endswith(".NoMask"):
        masker = checked["mask._target_"].rpartition(".")[2]
        yield f"{shown} with {masker}: smaller crops are compared with whole views, of which none is masked; mask=none"
    elif not checked.config.get("regularizer"):
        yield f"{shown} without a regularizer: nothing compares the crops; regularizer=[cross_view,sigreg]"
    if "augment.local_size" in checked:
        sizes = pair_of(checked["augment.local_size"])
        if sizes is None:
            yield f"{checked.show('augment.local_size')}: takes a number of pixels, or [height, width]"
            return
        patches = pair_of(checked["encoder.patch_size"]) or sizes
        for size, patch in dict.fromkeys(zip(sizes, patches, strict=True)):
            yield from not_divisible(checked, "augment.local_size", size, "encoder.patch_size", patch)


def _folders(checked: Checked) -> Iterator[str]:
    root = checked["dataset.root_path"]
    kinds = {"dataset.image_folder": "IMAGE.jpg", "dataset.video_folder": "VIDEO.mp4"}
    file = next((kinds[key] for key in kinds if key in checked), "")
    for key in (*kinds, "dataset.val_folder"):
        if key not in checked:
            continue
        folder = Path(root).expanduser().absolute() / checked[key]
        if not folder.is_dir():
            both = f"{checked.show('dataset.root_path')} with {checked.show(key)}"
            layout = f"{folder}/CLASS/{file}, or {folder}/{file} without labels"
            yield f"{both}: there is no folder {folder}; {_what_is_there(folder)}; expected {layout}"
            return


def _clips(checked: Checked) -> Iterator[str]:
    if "dataset.fps" in checked and checked["dataset.stride"] != 1:
        both = f"{checked.show('dataset.fps')} with {checked.show('dataset.stride')}"
        yield f"{both}: give one of them; frames are chosen by time or by number"


def _downloaded(checked: Checked) -> Iterator[str]:
    folder = Path(checked["dataset.root_path"]).expanduser().absolute()
    if not checked["dataset.download"] and not folder.is_dir():
        shown = checked.show("dataset.root_path")
        yield f"{shown}: there is no folder {folder}; {_what_is_there(folder)}; dataset.download=true fetches the data"


def _local_path(checked: Checked) -> Iterator[str]:
    """A name on the hub has at most one slash and no dot in front; any other `path` lies on this machine."""
    path = checked["dataset.path"]
    is_local = path.startswith(("/", ".", "~")) or path.endswith(".parquet") or path.count("/") > 1
    absolute = Path(path).expanduser().absolute()
    if is_local and not any(sign in path for sign in "*?[") and not absolute.exists():
        yield f"{checked.show('dataset.path')}: there is no {absolute}; {_what_is_there(absolute)}"


def _shards(checked: Checked) -> Iterator[str]:
    for key in filter(checked.__contains__, ("dataset.shards", "dataset.val_shards")):
        try:
            find_shards(checked[key])
        except ValueError as fault:
            yield f"{checked.show(key)}: {fault}; {_what_is_there(Path(checked[key]).expanduser().absolute() / '_')}"


def _what_is_there(path: Path) -> str:
    """The nearest folder above that exists, and what it holds."""
    found = next(parent for parent in path.parents if parent.is_dir())
    names = sorted(entry.name + "/" * entry.is_dir() for entry in os.scandir(found) if not entry.name.startswith("."))
    listing = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    return f"{found} holds {listing or 'nothing'}"


OF_CROPS: tuple[Rule, ...] = (_local,)
"""Rules that a phase of other sizes can break."""

OF_DATA: tuple[Rule, ...] = (_ranges, _folders, _clips, _downloaded, _local_path, _shards)
