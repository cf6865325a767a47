"""The configuration of a run: what we read, how it is composed, and what is refused before anything is built."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from jepa.config import signatures
from jepa.config.compose import Composer, members, override_literal
from jepa.config.schema import (
    AugmentConfig,
    CropConfig,
    EvalConfig,
    EvaluationConfig,
    ExportConfig,
    TrainConfig,
    changed_keys,
    show_value,
    to_yaml,
)
from jepa.config.values import OPTIONAL
from jepa.errors import ConfigError, as_config_errors

__all__ = [
    "AugmentConfig",
    "Composer",
    "ConfigError",
    "EvalConfig",
    "EvaluationConfig",
    "ExportConfig",
    "TrainConfig",
    "as_config_errors",
    "build_with",
    "changed_keys",
    "compose",
    "compose_eval",
    "compose_export",
    "factory",
    "members",
    "override_literal",
    "to_dataclass",
    "to_yaml",
]


def factory(node: Mapping[str, Any]) -> Callable[..., Any]:
    """The callable of a component's node, with the arguments that the configuration gives; call it with the others.

    An empty node ("none") gives a callable that returns None; a mapping of nodes is handed on as one of factories.
    Raises ValueError for values that the annotations of the constructor do not allow.
    """
    if not node:
        return lambda **_: None
    _check(node, node)
    inner = {key: {name: factory(part) for name, part in value.items()} for key, value in node.items() if _parts(value)}
    outer = {key: value for key, value in node.items() if key not in inner}
    built = instantiate(outer, _partial_=True, _convert_="all")
    return partial(built, **inner) if inner else built


def build_with(node: Mapping[str, Any], **given: Any) -> Any:
    """The component of a node, with those of the given arguments that its constructor takes, checked as the others."""
    make = factory({key: value for key, value in node.items() if key not in given})
    _check(node, given)
    taken = inspect.signature(make).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
    return make(**{name: value for name, value in given.items() if takes_all or name in taken})


def _check(node: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Raises ValueError with all values that the constructor of a node does not allow, as a configuration's check."""
    with suppress(LookupError):
        signature = signatures.read(str(node.get("_target_")))
        allowed = {} if signature is None else signature.parameters
        known = {name: value for name, value in values.items() if name in allowed and not _is_node(value)}
        faults = {name: signatures.fault(allowed[name].annotation, name, value) for name, value in known.items()}
        if wrong := [f"{name}={show_value(known[name])}: {fault}" for name, fault in faults.items() if fault]:
            raise ValueError(f"{node['_target_']}: {'; '.join(wrong)}")


def _parts(value: Any) -> bool:
    return isinstance(value, Mapping) and any(map(_is_node, value.values()))


def _is_node(value: Any) -> bool:
    return isinstance(value, Mapping) and "_target_" in value


def compose(overrides: Sequence[str] = (), config_dir: str | os.PathLike | None = None) -> TrainConfig:
    """The configuration that `jepa-train` would run with these overrides. Raises ConfigError with all faults."""
    return to_dataclass(_composed("train", overrides, config_dir))


def compose_eval(overrides: Sequence[str] = (), config_dir: str | os.PathLike | None = None) -> EvalConfig:
    """The configuration of `jepa-eval` with these overrides. Raises ConfigError with all faults."""
    found = _composed("eval", overrides, config_dir)
    return EvalConfig(**{**found, "augment": CropConfig(**found["augment"]), "name": str(found["name"])})


def compose_export(overrides: Sequence[str] = (), config_dir: str | os.PathLike | None = None) -> ExportConfig:
    """The configuration of `jepa-export` with these overrides. Raises ConfigError with all faults."""
    return ExportConfig(**_composed("export", overrides, config_dir))


def _composed(
    config_name: str, overrides: Sequence[str], config_dir: str | os.PathLike | None = None
) -> dict[str, Any]:
    found = Composer(config_dir, config_name).inspect(overrides)
    if found.faults:
        raise ConfigError(found.faults)
    return found.config


def to_dataclass(config: Mapping[str, Any] | DictConfig) -> TrainConfig:
    """A composed configuration, resolved, as plain Python objects."""
    chosen_none = {group: {} for group in OPTIONAL}  # as evaluator=[], of which nothing is composed
    result = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TrainConfig), chosen_none, config))
    assert isinstance(result, TrainConfig)
    return result
