"""Read-only view of a configuration by dotted key, and checks that several rules share. Without torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jepa.config import signatures
from jepa.config.catalogue import flatten
from jepa.config.schema import show_value

Describe = Callable[[str], str]
"""Dotted key -> the override that set it, or its value and the file."""


class MissingValue(KeyError):
    """A rule reads a value that is missing or already has an error; the rule is skipped."""


class ConfigView(Mapping[str, Any]):
    """A configuration by dotted key, without the values that are null, missing, or in `invalid`."""

    def __init__(
        self, config: Mapping[str, Any], describe_key: Describe, invalid: set[str], needs_data: bool = True
    ) -> None:
        self.config = config
        self.needs_data = needs_data
        """False if the files of data sets are not looked for"""
        self._describe_key = describe_key
        self._invalid = invalid
        self._values = {k: v for k, v in flatten(config) if k not in invalid and v is not None and v != "???"}

    def describe(self, *keys: str) -> str:
        """Start of a message: each key with its value and where it was set, as "epochs=3 with steps=9"."""
        return " with ".join(map(self._describe_key, keys))

    def with_values(self, values: Mapping[str, Any]) -> ConfigView:
        """The same configuration with other values of some top-level keys."""

        def describe_key(key: str) -> str:
            return f"{key}={show_value(values[key])}" if key in values else self._describe_key(key)

        return ConfigView({**self.config, **values}, describe_key, self._invalid - set(values), self.needs_data)

    def __getitem__(self, key: str) -> Any:
        if key not in self._values:
            raise MissingValue(key)
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


Rule = Callable[[ConfigView], Iterator[str]]
"""Yields a message for each error that it finds."""


def pair_of(value: Any) -> tuple[int, int] | None:
    """(height, width) of a positive integer or a list of two, None for anything else."""
    pair: list[Any] = value if isinstance(value, list) else [value, value]
    if len(pair) != 2 or not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in pair):
        return None
    return pair[0], pair[1]


def check_size(view: ConfigView, key: str) -> Iterator[str]:
    if pair_of(view[key]) is None:
        yield f"{view.describe(key)}: takes a number of pixels, or [height, width]"


def not_divisible(view: ConfigView, size_key: str, size: int, patch_key: str, patch: int) -> Iterator[str]:
    if patch > 0 and size % patch:
        below = size // patch * patch
        near = ", ".join(str(side) for side in (below, below + patch) if side)
        yield f"{view.describe(size_key, patch_key)}: {size} is not divisible by {patch}; nearest: {near}"


def hides_tokens(view: ConfigView) -> bool:
    return signatures.traits(view["mask._target_"]).get("hides_tokens", True)
