"""What must hold of the files of a data set, as its class names it; the constructors check the same. Without torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from jepa.config.paths import content, existing, find_shards, on_this_machine
from jepa.config.view import ConfigView


def folders(view: ConfigView, path: str) -> Iterator[str]:
    """Folders of files by class, and the held-out part beside them."""
    keys = [key for key in ("image_folder", "video_folder", "val_folder") if f"{path}.{key}" in view]
    file = "VIDEO.mp4" if "video_folder" in keys else "IMAGE.jpg"
    for fault in _missing(view, path, ((key, view[f"{path}.{key}"]) for key in keys), "folder"):
        yield f"{fault}; expected CLASS/{file} in it, or {file} without labels"


def voc(view: ConfigView, path: str) -> Iterator[str]:
    keys = [key for key in ("split", "val_split", "test_split") if f"{path}.{key}" in view]
    lists = [(key, f"ImageSets/Main/{view[f'{path}.{key}']}.txt") for key in keys]
    yield from _missing(view, path, [("root_path", "Annotations"), ("root_path", "JPEGImages"), *lists])


def coco(view: ConfigView, path: str) -> Iterator[str]:
    keys = (f"{part}{kind}" for part in ("", "val_", "test_") for kind in ("annotations", "images"))
    yield from _missing(view, path, ((k, view[f"{path}.{k}"]) for k in keys if f"{path}.{k}" in view))


def download(view: ConfigView, path: str) -> Iterator[str]:
    """Without a download the data lie in `root_path`; some data sets have no colours."""
    if view.get("augment.grayscale", 0) > 0 and view[f"{path}.name"] in ("mnist", "fashion_mnist"):
        yield f"{view.describe('augment.grayscale')}: the pictures are grey already; set it to 0"
    if not view[f"{path}.download"]:
        faults = _missing(view, path, [("root_path", "")], "folder")
        yield from (f"{fault}; {path}.download=true fetches the data" for fault in faults)


def local_or_hub(view: ConfigView, path: str) -> Iterator[str]:
    try:
        on_this_machine(view[f"{path}.path"])
    except ValueError as fault:
        yield f"{view.describe(f'{path}.path')}: {fault}"


def shards(view: ConfigView, path: str) -> Iterator[str]:
    for key in filter(view.__contains__, (f"{path}.shards", f"{path}.val_shards")):
        try:
            find_shards(view[key])
        except ValueError as fault:
            yield f"{view.describe(key)}: {fault}; {content(Path(view[key]).expanduser().absolute().parent)}"


def frame_rate(view: ConfigView, path: str) -> Iterator[str]:
    if f"{path}.fps" in view and view[f"{path}.stride"] != 1:
        both = f"{view.describe(f'{path}.fps')} with {view.describe(f'{path}.stride')}"
        yield f"{both}: give one of them; frames are chosen by time or by number"


def _missing(view: ConfigView, path: str, places: Iterable[tuple[str, str]], kind: str = "") -> Iterator[str]:
    """The first of the pairs of a key and a name in `root_path` that is not there."""
    root = Path(view[f"{path}.root_path"]).expanduser().absolute()
    for key, name in places:
        shown = dict.fromkeys(view.describe(f"{path}.{k}") for k in ("root_path", key))
        try:
            existing(root / name, " with ".join(shown), kind)
        except ValueError as fault:
            yield str(fault)
            return
