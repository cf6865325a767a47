"""Configuration checks of the data sets' files, without torch; the constructors check the same."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from jepa.config import signatures
from jepa.config.paths import content, existing, find_shards, on_this_machine
from jepa.config.urls import check_shard_url, check_url, is_url
from jepa.config.view import ConfigView


def folders(view: ConfigView, path: str) -> Iterator[str]:
    """The folders of files and of the held-out part exist."""
    names = _values(view, path, ("image_folder", "video_folder", "val_folder"))
    file = "VIDEO.mp4" if view[f"{path}._target_"].endswith("VideoFolder") else "IMAGE.jpg"
    for error in _missing(view, path, [("root_path", ""), *names.items()], "folder"):
        yield f"{error}; expected CLASS/{file} in it, or {file} without labels"


def voc(view: ConfigView, path: str) -> Iterator[str]:
    splits = _values(view, path, ("split", "val_split", "test_split"))
    lists = [(key, f"ImageSets/Main/{split}.txt") for key, split in splits.items()]
    yield from _missing(view, path, [("root_path", "Annotations"), ("root_path", "JPEGImages"), *lists])


def coco(view: ConfigView, path: str) -> Iterator[str]:
    keys = [f"{part}{kind}" for part in ("", "val_", "test_") for kind in ("annotations", "images")]
    yield from _missing(view, path, _values(view, path, keys).items())


def download(view: ConfigView, path: str) -> Iterator[str]:
    """Without a download `root_path` exists; grey data sets cannot be made grey."""
    if view.get("augment.grayscale", 0) > 0 and view[f"{path}.name"] in ("mnist", "fashion_mnist"):
        yield f"{view.describe('augment.grayscale')}: the pictures are grey already; set it to 0"
    if not view[f"{path}.download"]:
        errors = _missing(view, path, [("root_path", "")], "folder")
        yield from (f"{error}; {path}.download=true fetches the data" for error in errors)


def local_or_hub(view: ConfigView, path: str) -> Iterator[str]:
    """A file or folder that exists, a name on the hub, or a URL; a stream comes from a server."""
    place = view[f"{path}.path"]
    try:
        if is_url(place):
            check_url(place)
        elif view.needs_data and on_this_machine(place) and view.get(f"{path}.stream"):
            yield f"{view.describe(f'{path}.stream')}: {place} is on this machine and is read there; leave stream out"
    except ValueError as error:
        yield f"{view.describe(f'{path}.path')}: {error}"


def shards(view: ConfigView, path: str) -> Iterator[str]:
    for key in filter(view.__contains__, (f"{path}.shards", f"{path}.val_shards")):
        try:
            if is_url(view[key]):
                check_shard_url(view[key])
                continue
            if view.needs_data:
                find_shards(view[key])
        except ValueError as error:
            where = "" if is_url(view[key]) else f"; {content(Path(view[key]).expanduser().absolute().parent)}"
            yield f"{view.describe(key)}: {error}{where}"


def episodes(view: ConfigView, path: str) -> Iterator[str]:
    """The store exists, or an environment and a policy fill it; frames beyond an end are left out of the loss."""
    if view.get(f"{path}.pad") and "valid" not in signatures.traits(view["objective._target_"]).get("uses", ()):
        yield f"{view.describe(f'{path}.pad')}: objective=iris alone leaves repeated frames out"
    if any(key.startswith(f"{path}.env.") for key in view):
        if not any(key.startswith(f"{path}.policy.") for key in view) or f"{path}.episodes" not in view:
            yield f"{path}.env: collecting needs {path}.policy and {path}.episodes, their number"
        return
    folder = Path(view[f"{path}.path"]).expanduser().absolute()
    if not view.needs_data:
        return
    try:
        existing(existing(folder, view.describe(f"{path}.path"), "folder") / "store.json", f"{path}.path={folder}")
    except ValueError as error:
        yield f"{error}; jepa-collect writes a folder of episodes"


def frame_rate(view: ConfigView, path: str) -> Iterator[str]:
    if f"{path}.fps" in view and view[f"{path}.stride"] != 1:
        both = f"{view.describe(f'{path}.fps')} with {view.describe(f'{path}.stride')}"
        yield f"{both}: give one of them; frames are chosen by time or by number"


def _values(view: ConfigView, path: str, keys: Iterable[str]) -> dict[str, str]:
    return {key: view[f"{path}.{key}"] for key in keys if f"{path}.{key}" in view}


def _missing(view: ConfigView, path: str, files: Iterable[tuple[str, str]], kind: str = "") -> Iterator[str]:
    """An error for the first of the `files` (key, name in `root_path`) that does not exist."""
    root = Path(view[f"{path}.root_path"]).expanduser().absolute()
    for key, name in files if view.needs_data else ():
        settings = dict.fromkeys(view.describe(f"{path}.{k}") for k in ("root_path", key))
        try:
            existing(root / name, " with ".join(settings), kind)
        except ValueError as error:
            yield str(error)
            return
