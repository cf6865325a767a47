"""A configuration as the rules read it, by dotted key, and what several of them share. Without torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jepa.config import signatures
from jepa.config.catalogue import flatten
from jepa.config.schema import show_value

Describe = Callable[[str], str]
"""Dotted key -> the override that set it, or its value and the file."""


class MissingValue(KeyError):
    """A rule needs a value that is not there, or that is already refused."""


class ConfigView(Mapping[str, Any]):
    """A configuration by dotted key, without the values that are null, not given, or already refused."""

    def __init__(self, config: Mapping[str, Any], show: Describe, refused: set[str]) -> None:
        self.config = config
        self.show = show
        self.refused = refused
        self._values = {k: v for k, v in flatten(config) if k not in refused and v is not None and v != "???"}

    def changed(self, values: Mapping[str, Any]) -> ConfigView:
        """The same configuration with other values of some top-level keys."""

        def show(key: str) -> str:
            return f"{key}={show_value(values[key])}" if key in values else self.show(key)

        return ConfigView({**self.config, **values}, show, self.refused - set(values))

    def __getitem__(self, key: str) -> Any:
        if key not in self._values:
            raise MissingValue(key)
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def pair_of(value: Any) -> tuple[int, int] | None:
    """(height, width) of a whole number or two of them, None of anything else."""
    pair: list[Any] = value if isinstance(value, list) else [value, value]
    if len(pair) != 2 or not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in pair):
        return None
    return pair[0], pair[1]


def not_divisible(checked: ConfigView, size_key: str, size: int, patch_key: str, patch: int) -> Iterator[str]:
    if patch > 0 and size % patch:
        below = size // patch * patch
        near = ", ".join(str(side) for side in (below, below + patch) if side)
        both = f"{checked.show(size_key)} with {checked.show(patch_key)}"
        yield f"{both}: {size} is not divisible by {patch}; nearest: {near}"


def hides_tokens(checked: ConfigView) -> bool:
    return signatures.traits(checked["mask._target_"]).get("hides_tokens", True)


Rule = Callable[[ConfigView], Iterator[str]]
