"""The contents of the configuration folders: groups, their choices and every key."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf.errors import OmegaConfBaseException

from jepa.config.files import read_yaml
from jepa.errors import ConfigError, FileError

COMPARISONS = "compare"
UNREADABLE = (ValueError, TypeError, LookupError, AttributeError, RecursionError, OmegaConfBaseException)
"""What Hydra raises for files of other bytes, values or depth than it expects."""
EXPERIMENTS = ("experiment", "rl")
"""Groups whose choices set keys of others: experiments of jepa-train, recipes of jepa-rl."""
GLOBAL_GROUPS = {"experiment", "sweep", "compare"}
"""Groups whose files set keys of all others."""


def conf_folder() -> Path:
    """conf/ inside the installed package, or at the top of a checkout."""
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
        return self.path.read_text(encoding="utf-8", errors="replace")

    @cached_property
    def comment(self) -> str:
        """The first comment line that is neither a Hydra directive nor the command of an experiment."""
        lines = (line.lstrip("# ").rstrip() for line in self.text.splitlines() if line.startswith("#"))
        return next((line for line in lines if line and not line.startswith(("@package", "jepa-"))), "")

    @cached_property
    def package(self) -> str:
        """Key that the content is placed under: that of the header, by default the group."""
        header = re.search(r"^#\s*@package\s+(\S+)", self.text, re.MULTILINE)
        return self.group if header is None else header[1].removeprefix("_global_").strip(".")

    @cached_property
    def comments(self) -> dict[str, str]:
        """Dotted key -> the comment beside it, with the lines that continue it."""
        path, comments = [], {}
        for indent, key, text in re.findall(r"^( *)(\w+):.*?(?: +# (.*(?:\n {10,}# .*)*))?$", self.text, re.MULTILINE):
            path = [*(outer for outer in path if outer[0] < len(indent)), (len(indent), key)]
            names = [*filter(None, [self.package]), *(name for _, name in path)]
            comments[".".join(names)] = re.sub(r"\s*\n *# ", " ", text)
        return comments

    @cached_property
    def values(self) -> dict[str, Any]:
        """Dotted key -> value, as written in the file; empty if it is no valid YAML."""
        try:
            content = read_yaml(self.path, aliases=True)
        except FileError:
            return {}
        body = {key: value for key, value in content.items() if key != "defaults"}
        return dict(flatten(body, self.package))


@contextmanager
def naming_files(folders: Sequence[Path], choices: Sequence[str]) -> Iterator[None]:
    """Raises ConfigError with the file at fault where Hydra stumbles over a YAML file and does not name it.

    The files of these choices, as dataset=mine, are looked at first.
    """
    try:
        yield
    except UNREADABLE:
        names = {word for choice in choices for word in re.findall(r"\w+", choice.partition("=")[2])}
        files = sorted(path for folder in folders for path in folder.rglob("*.yaml") if path.is_file())
        for path in sorted(files, key=lambda path: path.stem not in names):
            try:
                read_yaml(path, aliases=True)
            except FileError as error:
                raise ConfigError([f"{error}"]) from error
        raise


class Catalogue:
    """All choices of the folders; of two files with the same name the first counts, as in Hydra.

    conf/compare/ is left out: it holds lists of runs for jepa-compare.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self.groups: dict[str, dict[str, Choice]] = {}
        for folder in folders:
            for path in sorted(folder.glob("*/**/*.yaml")):
                group = path.parent.relative_to(folder).as_posix()
                if group == COMPARISONS or not path.is_file():
                    continue
                self.groups.setdefault(group, {}).setdefault(path.stem, Choice(group, path.stem, path))

    @cached_property
    def keys(self) -> dict[str, list[Choice]]:
        """Dotted key -> the choices that set it, without `GLOBAL_GROUPS`, which repeat the keys of others."""
        keys: dict[str, list[Choice]] = {}
        for choice in (choice for group in self.groups.values() for choice in group.values()):
            if choice.group in GLOBAL_GROUPS or choice.group.startswith("hydra"):
                continue
            for key in choice.values:
                if not key.endswith("_target_"):
                    keys.setdefault(key, []).append(choice)
        return keys


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf; an empty section is a leaf."""
    for key, value in values.items():
        path = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, Mapping) and value:
            yield from flatten(value, path)
        else:
            yield path, value


def components(values: Any, prefix: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every node with a `_target_` inside a mapping under its dotted key, also those inside other nodes."""
    for key, node in values.items() if isinstance(values, Mapping) else ():
        if isinstance(node, Mapping) and "_target_" in node:
            yield f"{prefix}{key}", node
        yield from components(node, f"{prefix}{key}.")


def find(values: Any, path: str, default: Any = None) -> Any:
    """The value of a dotted key; numbers in it are indices of lists."""
    for part in path.split("."):
        if isinstance(values, Mapping) and part in values:
            values = values[part]
        elif isinstance(values, list) and part.isdigit() and int(part) < len(values):
            values = values[int(part)]
        else:
            return default
    return values
