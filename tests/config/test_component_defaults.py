"""A component that Python builds without a key is the one that the command line builds."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
from omegaconf import OmegaConf

from jepa.config.catalogue import conf_folder

DELIBERATE = {
    ("coco", "val_images"): "None reads the pictures of both parts from one folder, COCO's own layout has two",
    ("frames", "image_folder"): "'.' is the root itself, with videos in it; the example has parts",
    ("two_rooms_random", "walls"): "is what the choice is for",
    ("mixture", "probe"): "names a part of the example's own mixture",
    ("atari", "kwargs"): "are those of Atari 100k",
    ("vizdoom_basic", "kwargs"): "are four tics of a step, as is usual",
}
"""why the value in conf/ is another than that of the constructor"""


def nodes() -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in sorted(conf_folder().glob("*/*.yaml")):
        values = OmegaConf.to_container(OmegaConf.load(path))
        assert isinstance(values, dict)
        for node in (values, *values.values()):
            if isinstance(node, dict) and str(node.get("_target_", "")).startswith("jepa."):
                yield path, node


def plain(value: Any) -> Any:
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


@pytest.mark.parametrize(
    ("path", "node"), list(nodes()), ids=lambda value: value.stem if isinstance(value, Path) else ""
)
def test_defaults_of_the_constructor_are_those_of_the_configuration(path: Path, node: dict[str, Any]) -> None:
    parameters = inspect.signature(resolve_name(node["_target_"])).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items() if name in node}
    differing = {
        name: (node[name], default)
        for name, default in defaults.items()
        if default is not inspect.Parameter.empty and plain(default) != plain(node[name])
    }
    assert {(path.stem, name) for name in differing} <= DELIBERATE.keys(), differing
