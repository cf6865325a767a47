"""Settings given as `auto`: what a look at the images takes for them, and why.

The composed configuration holds plain values, so that a run keeps them and every command sees the same. Without torch,
which the look itself imports, once all other settings are checked.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from jepa.config import signatures
from jepa.config.catalogue import find
from jepa.config.checkpoints import newest
from jepa.config.files import read_yaml
from jepa.config.paths import on_this_machine
from jepa.config.schema import show_value
from jepa.config.urls import is_url
from jepa.config.view import pair_of
from jepa.errors import FileError

KEYS = ("image_size", "encoder.patch_size", "dataset.channels", "augment.grayscale")
"""Keys that may be auto, in the order in which they are settled."""
SMALL_SIDE = 48
"""Pixels of the shorter side below which images are small."""
SMALL, LARGE = 32, 64
"""Pixels at which small and other images are read."""
PATCHES = 4
"""Patches along a side of an image."""
GREY_SHARE = 0.1
"""Share of the crops of coloured images that become grey."""
NUM_LOOKED_AT = 48
Chosen = dict[str, tuple[Any, str]]
"""Key -> the value that was taken for it, and why."""


class Survey(NamedTuple):
    """What some images of a data set are like."""

    num_images: int
    height: int
    """median of the images looked at, as are the width and the shorter side"""
    width: int
    side: int
    grey: float
    """share of images without colour"""
    channels: int
    """of the images as they are read"""
    class_shares: Sequence[float]
    """share of each class among the labelled images, largest first"""

    def __str__(self) -> str:
        text = f"looked at {min(NUM_LOOKED_AT, self.num_images)} of {self.num_images:,} images: "
        text += f"{self.width} x {self.height} pixels in the median, {self.grey:.0%} grey"
        if len(self.class_shares) > 1:
            text += f"; the classes have {self.class_shares[-1]:.0%} to {self.class_shares[0]:.0%} of them"
        return text


def auto_keys(config: Mapping[str, Any]) -> list[str]:
    return [key for key in KEYS if find(config, key) == "auto"]


def settled(
    config: DictConfig, keys: list[str], errors: list[str], verify: Callable[[], dict[str, Any]], folder: Path,
    survey: Callable[[str], Survey], *, needs_data: bool,
) -> dict[str, Any]:  # fmt: skip
    """The configuration that `verify` returns with values for `keys`; `folder` is that of the run.

    Adds to `errors`, as `verify` does. Images are looked at once everything else is right.
    """
    plain: Any = OmegaConf.to_container(config)
    errors += _refusal(plain.get("dataset") or {}, keys)
    _set(config, settle(plain, keys))
    resolved = verify()
    if errors:
        return resolved
    node = resolved["dataset"] | ({"channels": "auto"} if "dataset.channels" in keys else {})
    try:
        chosen = _kept(folder, keys) or settle(plain, keys, survey(json.dumps(node)))
    except (ValueError, OSError) as error:
        if needs_data and not resolved["estimate"]:
            errors.append(f"{_named(keys)}: {error}; give a value")
        reasons = [f"assumed, as no image was looked at: {str(error).partition(';')[0]}", *["assumed"] * len(keys)]
        chosen = {
            key: (value, why) for why, (key, (value, _)) in zip(reasons, settle(plain, keys).items(), strict=False)
        }
    _set(config, chosen)
    return verify() | {"chosen": {key: reason for key, (_, reason) in chosen.items()}}


def look(node: str) -> Survey:
    """The survey of a data set, whose node is given as JSON. Raises ValueError or OSError if it has no images."""
    dataset = json.loads(node)
    return resolve_name(signatures.traits(dataset["_target_"])["survey"])(dataset)


def _set(config: DictConfig, chosen: Chosen) -> None:
    OmegaConf.set_struct(config, False)
    for key, (value, _) in chosen.items():
        OmegaConf.update(config, key, value)


def _refusal(node: Mapping[str, Any], keys: Sequence[str]) -> Iterator[str]:
    """An error for data of which no image can be looked at before the run, wherever they are."""
    target, path, reason = str(node.get("_target_")), node.get("path"), ""
    if "survey" not in signatures.traits(target):
        reason = f"{target.rpartition('.')[2]} is no data set of image files"
    elif node.get("stream") or any(map(is_url, (path, node.get("shards")))):
        reason = "these come from a server"
    elif isinstance(path, str) and path != "???":
        with suppress(ValueError):  # for a path that is not there, which the look explains
            reason = "" if on_this_machine(path) else f"{path} is a name on the hub"
    if reason:
        yield f"{_named(keys)}: needs images on this machine to look at, and {reason}; give a value"


def _kept(folder: Path, keys: Sequence[str]) -> Chosen:
    """The values of the run that was begun in `folder`, empty without: a resumed run does not choose anew."""
    last = newest(folder)
    config: dict[str, Any] = {}
    with suppress(FileError):  # reported when the run is resumed
        config = read_yaml(last / "config.yaml") if last else {}
    reasons = config.get("chosen") or {}
    kept = {key: (find(config, key), reasons.get(key, "as when the run was begun")) for key in keys}
    return {} if None in [value for value, _ in kept.values()] else kept


def settle(config: Mapping[str, Any], keys: Sequence[str], found: Survey | None = None) -> Chosen:
    """What images are best read with, by default large ones in colour; the given settings stand."""
    is_small, is_grey = (found.side < SMALL_SIDE, found.grey == 1) if found else (False, False)
    size: Any = find(config, "image_size")
    size = size if "image_size" not in keys else SMALL if is_small else LARGE
    height, width = (side // PATCHES or 1 for side in pair_of(size) or (LARGE, LARGE))
    given = found.channels if found else find(config, "dataset.channels") or 3
    channels = given if "dataset.channels" not in keys else 1 if is_grey else 3
    has_colour = channels == 3 and not is_grey
    colour = "no colour" if is_grey or channels == 1 else "colour" if channels == 3 else f"{channels} channels"
    chosen = {
        "image_size": (size, f"the shorter side of the images has {found.side} pixels in the median" if found else ""),
        "encoder.patch_size": (height if height == width else [height, width], f"{PATCHES} x {PATCHES} patches of it"),
        "dataset.channels": (channels, f"the images have {colour}"),
        "augment.grayscale": (GREY_SHARE if has_colour else 0.0, f"the images have {colour}"),
    }
    return {key: chosen[key] for key in keys}


def still_chosen(config: Mapping[str, Any], typed: Collection[str]) -> dict[str, str]:
    """The reasons of those settings of an earlier run that stay as they were chosen."""
    reasons = config["chosen"]
    return {key: reasons[key] for key in reasons if key not in typed and find(config, key) is not None}


def chosen_lines(config: Mapping[str, Any]) -> list[str]:
    """A line for each setting that was chosen: its value, and why."""
    return [f"{key}={show_value(find(config, key))}: {reason}" for key, reason in config["chosen"].items()]


def _named(keys: Sequence[str]) -> str:
    return " ".join(f"{key}=auto" for key in keys)
