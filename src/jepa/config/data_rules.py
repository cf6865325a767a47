"""What must hold between the keys of the data set and of its augmentation. Without torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from jepa.config.paths import find_shards
from jepa.config.view import ConfigView, Rule, not_divisible, pair_of


def _colours(checked: ConfigView) -> Iterator[str]:
    if checked.get("augment.grayscale", 0) > 0 and _is_grey(checked):
        yield f"{checked.show('augment.grayscale')}: the pictures are grey already; set it to 0"


def _is_grey(checked: ConfigView) -> bool:
    return checked.get("dataset.channels", 3) != 3 or checked.get("dataset.name") in ("mnist", "fashion_mnist")


def _local(checked: ConfigView) -> Iterator[str]:
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


def _folders(checked: ConfigView) -> Iterator[str]:
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


def _boxes(checked: ConfigView) -> Iterator[str]:
    """Folders and files of data sets with boxes."""
    root, target = Path(checked["dataset.root_path"]).expanduser().absolute(), checked["dataset._target_"]
    if target == "jepa.data.boxes.VOC":
        places = [("root_path", "Annotations"), ("root_path", "JPEGImages")]
        keys = [key for key in ("split", "val_split", "test_split") if f"dataset.{key}" in checked]
        places += [(key, f"ImageSets/Main/{checked[f'dataset.{key}']}.txt") for key in keys]
    elif target == "jepa.data.boxes.COCO":
        kinds = ("annotations", "images", "val_annotations", "val_images", "test_annotations", "test_images")
        places = [(key, checked[f"dataset.{key}"]) for key in kinds if f"dataset.{key}" in checked]
    else:
        return
    for key, name in places:
        if not (root / name).exists():
            shown = dict.fromkeys(checked.show(f"dataset.{k}") for k in ("root_path", key))
            yield f"{' with '.join(shown)}: there is no {root / name}; {_what_is_there(root / name)}"
            return


def _detector(checked: ConfigView) -> Iterator[str]:
    """A detector learns from one crop of a picture, with its boxes, and halves the grid for its coarsest level."""
    if checked["objective._target_"] != "jepa.objectives.detect.Detector":
        return
    if checked["dataset._target_"].startswith("jepa.") and ".boxes." not in checked["dataset._target_"]:
        yield "objective=detect: the data set has no boxes to learn from; choose dataset=voc or dataset=coco"
    for key, only in {"augment.views": 1, "augment.local_views": 0}.items():
        if checked[key] > only:
            yield f"{checked.show(key)}: objective=detect sees one crop of a picture; {key}={only}"
    if checked["objective.head"] == "fcos" and checked["objective.width"] % 32:
        yield f"{checked.show('objective.width')}: objective.head=fcos takes a multiple of 32"


def _pyramid(checked: ConfigView) -> Iterator[str]:
    """The coarsest level of a detector's pyramid halves the grid of patches."""
    if checked["objective._target_"] != "jepa.objectives.detect.Detector":
        return
    sizes, patches = pair_of(checked["image_size"]), pair_of(checked["encoder.patch_size"])
    for size, patch in dict.fromkeys(zip(sizes or (), patches or (), strict=False)):
        if not size % patch:
            yield from not_divisible(checked, "image_size", size, "encoder.patch_size", 2 * patch)


def _clips(checked: ConfigView) -> Iterator[str]:
    if "dataset.fps" in checked and checked["dataset.stride"] != 1:
        both = f"{checked.show('dataset.fps')} with {checked.show('dataset.stride')}"
        yield f"{both}: give one of them; frames are chosen by time or by number"


def _downloaded(checked: ConfigView) -> Iterator[str]:
    folder = Path(checked["dataset.root_path"]).expanduser().absolute()
    if not checked["dataset.download"] and not folder.is_dir():
        shown = checked.show("dataset.root_path")
        yield f"{shown}: there is no folder {folder}; {_what_is_there(folder)}; dataset.download=true fetches the data"


def _local_path(checked: ConfigView) -> Iterator[str]:
    """A name on the hub has at most one slash and no dot in front; any other `path` lies on this machine."""
    path = checked["dataset.path"]
    is_local = path.startswith(("/", ".", "~")) or path.endswith(".parquet") or path.count("/") > 1
    absolute = Path(path).expanduser().absolute()
    if is_local and not any(sign in path for sign in "*?[") and not absolute.exists():
        yield f"{checked.show('dataset.path')}: there is no {absolute}; {_what_is_there(absolute)}"


def _shards(checked: ConfigView) -> Iterator[str]:
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


OF_CROPS: tuple[Rule, ...] = (_local, _pyramid)
"""Rules that a phase of other sizes can break."""
OF_DATA: tuple[Rule, ...] = (_colours, _folders, _boxes, _detector, _clips, _downloaded, _local_path, _shards)
