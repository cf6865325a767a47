"""JEPAConfig: the configuration of `jepa-train` as Python attributes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from jepa.config import Composer, compose, override_literal
from jepa.config.catalogue import find, flatten
from jepa.config.schema import TrainConfig
from jepa.errors import ConfigError
from jepa.suggestions import suggestion


class UnknownKeyError(ConfigError, AttributeError):
    """There is no such key; also an AttributeError, so that `hasattr` works."""


class JEPAConfig:
    """Keys and groups as attributes; a wrong key or choice raises an error at once, a wrong value in `compose`.

    `JEPAConfig("mask=block", "encoder.depth=6", epochs=3)` takes overrides as on the command line and keys by name. The
    section of a key may be omitted if no other section has the key: `config.root_path` is `config.dataset.root_path`.
    The order of assignments does not matter; an unassigned key reads as its default.
    """

    def __init__(self, *overrides: str, config_dir: str | os.PathLike | None = None, **values: Any) -> None:
        composer = Composer(config_dir)
        parsed, errors = composer.parse(overrides)
        if errors:
            raise ConfigError(errors)
        keys = {*dict(flatten(composer.default([]))), *composer.catalogue.keys, *composer.catalogue.groups}
        keys |= {override.key_or_group for override in parsed if override.is_add() or override.is_force_add()}
        keys |= {key.rsplit(".", cut)[0] for key in keys for cut in range(1, key.count(".") + 1)}
        keys = {key for key in keys if not key.endswith("_target_")}
        self.__dict__.update({"_composer": composer, "_dir": config_dir, "_keys": keys, "_values": {}, "_texts": {}})
        for override in parsed:
            self._set(self._path(override.key_or_group), override.value(), override.input_line)
        for name, value in values.items():
            setattr(self, name, value)

    @property
    def overrides(self) -> list[str]:
        """The equivalent arguments of `jepa-train`."""
        return list(self._texts.values())

    def compose(self, folder: str | os.PathLike | None = None) -> TrainConfig:
        """The checked configuration, equal to that of the command line; `folder` is the run folder, if not the usual.

        Raises ConfigError with all errors.
        """
        return compose(self.overrides, self._dir, folder)

    def __setattr__(self, name: str, value: Any) -> None:
        self._set(self._path(name), value)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return self._get(self._path(name))

    def __dir__(self) -> Iterator[str]:
        yield from {"compose", "overrides", *(key.partition(".")[0] for key in self._keys)}

    def __repr__(self) -> str:
        return f"JEPAConfig({', '.join(map(repr, self.overrides))})"

    def _set(self, path: str, value: Any, text: str | None = None) -> None:
        value = value._value() if isinstance(value, Section) else value
        text = text or f"{path}={override_literal(value)}"
        if path in self._composer.catalogue.groups:
            parsed, errors = self._composer.parse([text])
            errors += filter(None, map(self._composer.choice_error, parsed))
            if errors:
                raise ConfigError(errors)
        self._values[path], self._texts[path] = value, text

    def _get(self, path: str) -> Any:
        return Section(self, path) if any(key.startswith(f"{path}.") for key in self._keys) else self._read(path)

    def _read(self, path: str) -> Any:
        """The assigned value, else the default with the present choices."""
        if path in self._values:
            return self._values[path]
        groups = self._composer.catalogue.groups
        choices = [text for key, text in self._texts.items() if key in groups]
        if path in groups:
            return self._composer.choice(choices, path)
        absent = object()
        value = find(self._composer.default(choices), path, absent)
        if value is absent:
            group = path.partition(".")[0]
            raise UnknownKeyError([f"{path}: {group}={self._read(group)} has no such key"])
        return {key: self._read(f"{path}.{key}") for key in value} if isinstance(value, dict) else value

    def _path(self, name: str, section: str = "") -> str:
        """The dotted key of an attribute. Raises UnknownKeyError with the nearest keys."""
        path = f"{section}{name}"
        if path in self._keys:
            return path
        matches = sorted(key for key in self._keys if key.endswith(f".{name}") and key.startswith(section))
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise UnknownKeyError([f"{path}: which of {', '.join(matches)}?"])
        raise UnknownKeyError([f'there is no key "{path}"{suggestion(path, self._keys)}'])


class Section:
    """A group or section of a JEPAConfig: its keys are attributes, and it compares equal to the name of the choice."""

    def __init__(self, config: JEPAConfig, path: str) -> None:
        self.__dict__.update({"_config": config, "_prefix": f"{path}."})

    def __setattr__(self, name: str, value: Any) -> None:
        self._config._set(self._config._path(name, self._prefix), value)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return self._config._get(self._config._path(name, self._prefix))

    def __dir__(self) -> Iterator[str]:
        keys = (key.removeprefix(self._prefix) for key in self._config._keys if key.startswith(self._prefix))
        yield from {key.partition(".")[0] for key in keys}

    def __eq__(self, other: object) -> bool:
        return self._value() == (other._value() if isinstance(other, Section) else other)

    def __hash__(self) -> int:
        return hash(repr(self))

    def __iter__(self) -> Iterator[Any]:
        return iter(self._value())

    def __str__(self) -> str:
        return str(self._value())

    def __repr__(self) -> str:
        return repr(self._value())

    def _value(self) -> Any:
        return self._config._read(self._prefix.removesuffix("."))
