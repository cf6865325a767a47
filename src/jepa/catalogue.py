"""What the configuration folders offer: groups, their choices, every key, and the name nearest to a wrong one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

ELSEWHERE = {
    "learning_rate": "lr",
    "wd": "schedule.weight_decay",
    "warmup": "schedule.warmup_ratio",
    "ema": "objective.momentum",
    "model": "encoder",
    "arch": "encoder",
    "model_size": "size",
    "data": "dataset",
    "data_dir": "dataset.root_path",
    "root": "dataset.root_path",
    "img_size": "image_size",
    "resolution": "image_size",
    "dtype": "precision",
    "amp": "precision",
    "output_dir": "name",
    "accumulate": "micro_batch_size",
    "grad_accum": "micro_batch_size",
    "workers": "num_workers",
}
"""What other programs call it."""

COMPARISONS = "compare"


OVERALL = {"experiment", "sweep", "compare"}
"""Groups whose files set keys of all others."""


def conf_folder() -> Path:
    """conf/ inside an installed wheel, or at the top of a checkout."""
    here = Path(__file__).resolve().parent
    return next(path for path in (here / "conf", here.parents[1] / "conf") if (path / "train.yaml").is_file())


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
        """Every key that a choice sets -> the choices that set it. Files of `OVERALL` only repeat what others have."""
        keys: dict[str, list[Choice]] = {}
        for choice in (choice for group in self.groups.values() for choice in group.values()):
            if choice.group in OVERALL or choice.group.startswith("hydra"):
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


def nearest(name: str, known: Iterable[str], limit: int = 3) -> list[str]:
    """Known names that a wrong one may have meant: the same leaf elsewhere, a synonym, or a slip of the keys."""
    known = sorted(set(known))
    leaf = name.rpartition(".")[2]
    if leaf in known and leaf != name:
        return [leaf]
    if same := [key for key in known if key.rpartition(".")[2] == leaf and key != name]:
        return same
    if ELSEWHERE.get(leaf) in known:
        return [ELSEWHERE[leaf]]
    scores = {key: _likeness(name, leaf, key) for key in known}
    best = max(scores.values(), default=0.0)
    close = [key for key in known if scores[key] >= max(0.6, best - 0.05)]
    return sorted(close, key=lambda key: -scores[key])[:limit]


def _likeness(name: str, leaf: str, key: str) -> float:
    """Whole names, and for less the last part where a name has no section; a beginning of the key counts more."""
    match = difflib.SequenceMatcher(None, name, key).ratio() + 0.2 * key.startswith(name)
    if name == leaf:
        match = max(match, 0.9 * difflib.SequenceMatcher(None, leaf, key.rpartition(".")[2]).ratio())
    return match


def suggestion(name: str, known: Iterable[str]) -> str:
    """'; did you mean "x" or "y"?', or nothing."""
    near = nearest(name, known)
    return "; did you mean " + " or ".join(f'"{key}"' for key in near) + "?" if near else ""
