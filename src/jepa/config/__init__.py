"""The configuration of a run: its schema, how it is composed, and the checks before anything is built."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from jepa.config import signatures
from jepa.config.command_rules import as_list
from jepa.config.compose import Composer
from jepa.config.overrides import members, name_as_text, override_literal
from jepa.config.run_data import names_data, run_data, run_readouts
from jepa.config.schema import (
    CollectConfig,
    CropConfig,
    EmbedConfig,
    EvalConfig,
    ExportConfig,
    PlanConfig,
    PlayConfig,
    PredictConfig,
    RLConfig,
    TrainConfig,
    changed_keys,
    show_value,
    to_yaml,
)
from jepa.config.values import OPTIONAL
from jepa.errors import ConfigError, as_config_errors

__all__ = [
    "Composer", "ConfigError", "EvalConfig", "TrainConfig", "as_config_errors", "build_with", "changed_keys", "compose",
    "compose_collect", "compose_embed", "compose_eval", "compose_export", "compose_plan", "compose_predict", "factory",
    "members", "name_as_text", "override_literal", "to_dataclass", "to_yaml", "with_run_data",
]  # fmt: skip


def factory(node: Mapping[str, Any]) -> Callable[..., Any]:
    """functools.partial of a node's class with its configured values; call it with the runtime arguments.

    An empty node ("none") gives a callable that returns None; a mapping of nodes becomes a mapping of factories.
    Raises ValueError for values that the annotations of the constructor do not allow.
    """
    if not node:
        return lambda **_: None
    _check(node, node)
    inner = {
        key: {name: factory(part) for name, part in value.items()} for key, value in node.items()
        if isinstance(value, Mapping) and any(map(_is_node, value.values()))
    }  # fmt: skip
    outer = {key: value for key, value in node.items() if key not in inner}
    make = instantiate(outer, _partial_=True, _convert_="all")
    return partial(make, **inner) if inner else make


def build_with(node: Mapping[str, Any], **runtime: Any) -> Any:
    """Build a node with those runtime arguments that its constructor takes; they are checked as its values are."""
    make = factory({key: value for key, value in node.items() if key not in runtime})
    _check(node, runtime)
    parameters = inspect.signature(make).parameters
    has_kwargs = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return make(**{name: value for name, value in runtime.items() if has_kwargs or name in parameters})


def _check(node: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Raises ValueError with all values that the annotations of a node's constructor do not allow."""
    signature = signatures.read_if_known(node.get("_target_"))
    errors = []
    for name, value in values.items():
        parameter = signature.parameters.get(name) if signature and not _is_node(value) else None
        if parameter and (error := signatures.value_error(parameter.type, name, value)):
            errors.append(f"{name}={show_value(value)}: {error}")
    if errors:
        raise ValueError(f"{node['_target_']}: {'; '.join(errors)}")


def _is_node(value: Any) -> bool:
    return isinstance(value, Mapping) and "_target_" in value


def compose(
    overrides: Sequence[str] = (), config_dir: str | os.PathLike | None = None, folder: str | os.PathLike | None = None
) -> TrainConfig:
    """The configuration that `jepa-train` would run with these overrides, by default in outputs/NAME.

    Raises ConfigError with all errors.
    """
    composer = Composer(config_dir)
    composer.run_folder = None if folder is None else Path(folder)
    return to_dataclass(composer.compose(overrides))


def compose_eval(overrides: Sequence[str] = (), config_dir: str | os.PathLike | None = None) -> EvalConfig:
    """The configuration of `jepa-eval` with these overrides. Raises ConfigError with all errors."""
    config = Composer(config_dir, "eval").compose(with_run_data(overrides, config_dir))
    return EvalConfig(**{**config, "augment": CropConfig(**config["augment"]), "name": str(config["name"])})


def with_run_data(overrides: Sequence[str], config_dir: str | os.PathLike | None = None) -> list[str]:
    """The overrides of jepa-eval after the readouts of the runs and, without `dataset=`, their data and a name."""
    config = Composer(config_dir, "eval").check(overrides).config
    runs = [str(run) for run in as_list(config.get("run"))]
    data = [] if names_data(overrides) else run_data(runs, config_dir)
    name = [f"name={override_literal(f'eval-{Path(runs[0]).name}')}"] if data else []
    probes = [
        probe
        for probe, node in (config.get("evaluator") or {}).items()
        if isinstance(node, Mapping) and "readout" in node
    ]
    return [*name, *data, *run_readouts(runs, probes), *overrides]


def compose_export(overrides: Sequence[str] = (), config_dir: str | os.PathLike | None = None) -> ExportConfig:
    """The configuration of `jepa-export` with these overrides. Raises ConfigError with all errors."""
    return ExportConfig(**Composer(config_dir, "export").compose(overrides))


def compose_collect(overrides: Sequence[str] = (), config_dir: str | os.PathLike | None = None) -> CollectConfig:
    """The configuration of `jepa-collect` with these overrides. Raises ConfigError with all errors."""
    config = Composer(config_dir, "collect").compose([name_as_text(override) for override in overrides])
    return CollectConfig(**{**config, "name": str(config["name"])})


def compose_plan(overrides: Sequence[str] = (), config_dir: str | os.PathLike | None = None) -> PlanConfig:
    """The configuration of `jepa-plan` with these overrides. Raises ConfigError with all errors."""
    config = Composer(config_dir, "plan").compose([name_as_text(override) for override in overrides])
    return PlanConfig(**{"env": None, "cost": {}, **config, "name": str(config["name"])})


def compose_rl(overrides: Sequence[str] = (), config_dir: str | os.PathLike | None = None) -> RLConfig:
    """The configuration of `jepa-rl` with these overrides. Raises ConfigError with all errors."""
    config = Composer(config_dir, "rl").compose([name_as_text(override) for override in overrides])
    return RLConfig(**{"logger": {}, **config, "name": str(config["name"])})


def compose_rl_runs(
    overrides: Sequence[str], config_dir: str | os.PathLike | None = None
) -> tuple[Path, dict[str, RLConfig]]:
    """The folder of `jepa-rl` and its runs: one, named "", or one for each combination of the values of key=a,b.

    Those are named by what they differ in, as "lr=1e-3,seed=1". Raises ConfigError with the errors of all.
    """
    configs = {}
    parsed, errors = Composer(config_dir, "rl").parse([name_as_text(override) for override in overrides])
    several = [override.key_or_group for override in parsed if override.is_sweep_override()]
    name = ""
    for chosen in members(parsed):
        label = ",".join(one for one in chosen if one.partition("=")[0] in several)
        try:
            configs[label] = compose_rl(chosen, config_dir)
            name = configs[label].name
            configs[label].name = f"{name}/{label}" if label else name
        except ConfigError as error:
            errors += [text if not label else f"{label}: {text}" for text in error.errors]
    if errors:
        raise ConfigError(errors)
    return Path("outputs", name), configs


def compose_play(overrides: Sequence[str] = (), config_dir: str | os.PathLike | None = None) -> PlayConfig:
    """The configuration of `jepa-play` with these overrides. Raises ConfigError with all errors."""
    return PlayConfig(**{"env": None, "keys": {}, **Composer(config_dir, "play").compose(overrides)})


def compose_embed(overrides: Sequence[str] = (), config_dir: str | os.PathLike | None = None) -> EmbedConfig:
    """The configuration of `jepa-embed` with these overrides. Raises ConfigError with all errors."""
    return EmbedConfig(**{"dataset": None, **Composer(config_dir, "embed").compose(overrides)})


def compose_predict(overrides: Sequence[str] = (), config_dir: str | os.PathLike | None = None) -> PredictConfig:
    """The configuration of `jepa-predict` with these overrides. Raises ConfigError with all errors."""
    return PredictConfig(**Composer(config_dir, "predict").compose(overrides))


def to_dataclass(config: Mapping[str, Any] | DictConfig) -> TrainConfig:
    """A composed configuration, resolved, as plain Python objects."""
    empty = {group: {} for group in OPTIONAL if group in TrainConfig.__dataclass_fields__}  # as evaluator=[] leaves out
    result = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TrainConfig), empty, config))
    assert isinstance(result, TrainConfig)
    return result
