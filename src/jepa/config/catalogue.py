"""What the configuration folders offer: groups, their choices, every key, and the name nearest to a wrong one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

COMPARISONS = "compare"

GLOBAL_GROUPS = {"experiment", "sweep", "compare"}
"""Groups whose files set keys of all others."""


def conf_folder() -> Path:
    """conf/ inside an installed wheel, or at the top of a checkout."""
    package = Path(__file__).resolve().parents[1]
    return next(path for path in (package / "conf", package.parents[1] / "conf") if (path / "train.yaml").is_file())


@dataclass(frozen=True)
class Choice:
    """One file of one group."""

    group: str
    name: str
    path: Path

    @property
    def label(self) -> str:
        return f"{self.group}/{self.path.name}".removeprefix("/")

    @cached_property
    def text(self) -> str:
        return self.path.read_text()

    @cached_property
    def comment(self) -> str:
        """The first comment line that is neither a directive to Hydra nor the command of an experiment."""
        lines = (line.lstrip("# ").rstrip() for line in self.text.splitlines() if line.startswith("#"))
        return next((line for line in lines if line and not line.startswith(("@package", "jepa-train"))), "")

    @cached_property
    def package(self) -> str:
        """Where the content goes: the group itself, or what the header says."""
        header = re.search(r"^#\s*@package\s+(\S+)", self.text, re.MULTILINE)
        return self.group if header is None else header[1].removeprefix("_global_").strip(".")

    @cached_property
    def values(self) -> dict[str, Any]:
        """Dotted key -> value, as written in the file; empty where the file cannot be read as YAML."""
        try:
            content = yaml.load(self.text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        except yaml.YAMLError:
            return {}
        body = {key: value for key, value in (content or {}).items() if key != "defaults"}
        return dict(flatten(body, self.package))


class Catalogue:
    """All choices of the folders; where two folders have the same file, the first wins, as it does for Hydra.

    conf/compare/ holds lists of runs for jepa-compare, which are no choice of a run.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self.groups: dict[str, dict[str, Choice]] = {}
        for folder in folders:
            for path in sorted(folder.glob("*/**/*.yaml")):
                group = path.parent.relative_to(folder).as_posix()
                if group == COMPARISONS:
                    continue
                self.groups.setdefault(group, {}).setdefault(path.stem, Choice(group, path.stem, path))

    @cached_property
    def keys(self) -> dict[str, list[Choice]]:
        """Every key that a choice sets -> the choices that set it; `GLOBAL_GROUPS`, which repeat keys, are left out."""
        keys: dict[str, list[Choice]] = {}
        for choice in (choice for group in self.groups.values() for choice in group.values()):
            if choice.group in GLOBAL_GROUPS or choice.group.startswith("hydra"):
                continue
            for key in choice.values:
                if not key.endswith("_target_"):
                    keys.setdefault(key, []).append(choice)
        return keys


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of a tree under dotted names; an empty section is a leaf."""
    for key, value in values.items():
        path = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, Mapping) and value:
            yield from flatten(value, path)
        else:
            yield path, value


def find(values: Any, path: str, default: Any = None) -> Any:
    """The value under a dotted name; numbers in it count the items of a list."""
    for part in path.split("."):
        if isinstance(values, Mapping) and part in values:
            values = values[part]
        elif isinstance(values, list) and part.isdigit() and int(part) < len(values):
            values = values[int(part)]
        else:
            return default
    return values
