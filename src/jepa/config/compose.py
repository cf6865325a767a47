"""Composes a configuration with Hydra's own loader and reports all its errors at once, without torch."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository, ConfigRepository
from hydra._internal.defaults_list import create_defaults_list
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import setup_globals
from hydra.errors import ConfigCompositionException, HydraException
from hydra.plugins.config_source import ConfigResult
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from jepa.config import signatures
from jepa.config.auto import auto_keys, look, settled, still_chosen
from jepa.config.catalogue import EXPERIMENTS, GLOBAL_GROUPS, Catalogue, Choice, conf_folder, find, naming_files
from jepa.config.layouts import choose_folders
from jepa.config.override_errors import hydra_message, needs_multirun, syntax_error
from jepa.config.overrides import as_typed, override_literal
from jepa.config.precedence import chooses, hidden_values, implied_values, is_length_typed
from jepa.config.schema import CONFIGS, TrainConfig, show_value
from jepa.config.values import accepts, unknown_key, unused_overrides, value_errors, without_unused
from jepa.errors import ConfigError
from jepa.suggestions import suggestion

ABSENT = object()
PATHS = {"run", "task"}
"""Keys of jepa-eval that take any value: a path, or a list of them."""
SCHEMAS = {"schema" if command == "train" else f"{command}_schema": kind for command, kind in CONFIGS.items()}
"""Name in a defaults list -> dataclass of the configurations that begin with it."""


def _choice(group: str, *, _root_: DictConfig) -> str:
    """`${choice:GROUP}` in a configuration: the name of the choice, before and inside a job."""
    hydra = _root_.get("hydra") or HydraConfig.get()
    return str(hydra.runtime.choices[group])


for _name, _schema in SCHEMAS.items():
    ConfigStore.instance().store(name=_name, node=_schema)
OmegaConf.register_new_resolver("choice", _choice, replace=True)


class CheckResult(NamedTuple):
    config: dict[str, Any]
    """resolved, with "???" for missing values; empty if it could not be composed"""
    errors: list[str]


class Composer:
    """Composes and checks configurations; caches the result of the same choices, for the members of a sweep."""

    needs_data = True
    """False where a configuration is only shown: its data need not be on this machine, its folder may exist"""
    run_folder: Path | None = None
    """of a run that is not in outputs/NAME or the folder of its sweep; settings that it has chosen are kept"""

    def __init__(self, config_dir: str | os.PathLike | None = None, config_name: str = "train") -> None:
        self.config_name = config_name.removesuffix(".yaml")
        self.folders = [conf_folder()]
        if config_dir is not None:
            self.folders.append(Path(config_dir).absolute())
            if not self.folders[-1].is_dir():
                raise ConfigError([f"--config-dir {config_dir}: there is no folder {self.folders[-1]}"])
        self.catalogue = Catalogue(self.folders)
        self.schema = CONFIGS.get(self.config_name, TrainConfig)
        self.hydra_defaults = [] if self.config_name in CONFIGS else self._hydra_defaults()
        self._loader = _loader(self.folders)
        self._bases: dict[tuple[str, ...], DictConfig] = {}
        self._shared = _compositions(self.config_name) if config_dir is None else {}
        self._parsed: dict[str, Override] = {}
        self._look = cache(look)

    @cached_property
    def _primary(self) -> Choice | None:
        paths = (folder / f"{self.config_name}.yaml" for folder in self.folders)
        return next((Choice("", self.config_name, path) for path in paths if path.is_file()), None)

    @cached_property
    def _own_choices(self) -> set[str]:
        """Groups for which a primary configuration that extends train.yaml makes another choice."""
        return set(re.findall(r"^ *- override ([\w/]+):", self._primary.text, re.MULTILINE)) if self._primary else set()

    def _hydra_defaults(self) -> list[str]:
        """Overrides with those Hydra settings of train.yaml that another primary configuration lacks."""
        if self._own_choices:
            return []
        present = self._primary.values if self._primary else {}
        defaults = Choice("", "train", self.folders[0] / "train.yaml").values.items()
        return [f"{k}={override_literal(v)}" for k, v in defaults if k.startswith("hydra.") and k not in present]

    def compose(self, overrides: Sequence[str]) -> dict[str, Any]:
        """The checked configuration with these overrides. Raises ConfigError with all errors."""
        config, errors = self.check(overrides)
        if errors:
            raise ConfigError(errors)
        return config

    def check(self, overrides: Sequence[str], sweep_folder: str | None = None) -> CheckResult:
        """Compose with overrides and collect all errors; `sweep_folder` is the folder name of a member of a sweep."""
        parsed, errors = self.parse(overrides)
        try:
            return CheckResult(self._check(parsed, errors, sweep_folder), errors)
        except ConfigError as error:
            return CheckResult({}, [*errors, *error.errors])
        except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
            return CheckResult({}, [*errors, hydra_message(error)])

    def _check(self, parsed: Sequence[Override], errors: list[str], sweep_folder: str | None) -> dict[str, Any]:
        """The resolved configuration; adds to `errors`."""
        groups = [override for override in parsed if self.is_group(override)]
        invalid = {id(override): error for override in groups if (error := self.choice_error(override))}
        errors += invalid.values()
        choices = [o for o in parsed if id(o) not in invalid and (o in groups or o.is_hydra_override())]
        base = self._base((*self.hydra_defaults, *(override.input_line or "" for override in choices)))
        config = base.copy()
        self._drop_inapplicable(config, {override.key_or_group for override in groups} | self._own_choices)
        values = [override for override in parsed if override not in groups and not override.is_hydra_override()]
        implied = [o for o in self._implied(groups, set(invalid)) if find(_plain(config), o.key_or_group) != o.value()]
        for override in (*implied, *values):
            errors += self._apply(config, override)
        typed = {override.key_or_group: override.input_line or "" for override in values}
        if is_length_typed(typed) and config.get("steps") is not None:
            config.steps = None
        describe = partial(self._describe, config.copy(), (*implied, *values))
        verify = partial(self._verify, config, base, parsed, typed, errors, describe, sweep_folder)
        keys = auto_keys(_plain(config)) if self.schema is TrainConfig else []
        if not keys:
            return verify()
        folder = self.run_folder or _run_folder(config, sweep_folder)
        return settled(config, keys, errors, verify, folder, self._look, needs_data=self.needs_data)

    def _verify(
        self, config: DictConfig, base: DictConfig, parsed: Sequence[Override], typed: Mapping[str, str],
        errors: list[str], describe: Callable[[str], str], sweep_folder: str | None,
    ) -> dict[str, Any]:  # fmt: skip
        """The resolved configuration; adds to `errors`."""
        resolved = _resolved(config)
        errors += hidden_values(typed, resolved)
        if self.schema is TrainConfig:
            triples = ((o.key_or_group, o.value(), o.input_line or o.key_or_group) for o in parsed)
            errors += unused_overrides(triples, resolved, _chosen(base, "objective"), _chosen(base, "encoder"))
            resolved = without_unused(resolved)
            if "chosen" in resolved:  # in config.yaml of a run
                resolved["chosen"] = still_chosen(resolved, typed)
        needs_data = self.needs_data and not resolved.get("estimate")
        errors += [error for error in choose_folders(resolved) if needs_data]
        schema = signatures.read(f"jepa.config.schema.{self.schema.__name__}")
        assert schema is not None
        errors += value_errors(resolved, schema, describe, needs_data=needs_data)
        if self.schema is TrainConfig and resolved["resume"] is False and needs_data:
            errors += _existing_run(_run_folder(config, sweep_folder))
        return resolved

    def parse(self, overrides: Sequence[str]) -> tuple[list[Override], list[str]]:
        """Overrides as Hydra parses them, and an error for each that it cannot parse."""
        errors = []
        for text in overrides:
            if text not in self._parsed:
                try:
                    self._parsed[text] = OverridesParser.create(self._loader).parse_override(text)
                except HydraException:
                    errors.append(syntax_error(text))
        return [self._parsed[text] for text in dict.fromkeys(overrides) if text in self._parsed], errors

    def is_group(self, override: Override) -> bool:
        """True if it chooses from a group; `experiment` of jepa-plan is a key, whose value names a choice."""
        if self._primary and override.key_or_group in self._primary.values:
            return False
        return override.key_or_group in self.catalogue.groups or override.key_or_group.startswith("hydra/")

    def default(self, overrides: Sequence[str]) -> dict[str, Any]:
        """The configuration of these choices, resolved but not checked."""
        return _resolved(self._base(tuple(overrides)))

    def hydra_setting(self, overrides: Sequence[str], key: str) -> Any:
        """The unresolved value of a key of Hydra's own section, None if there is none."""
        try:
            return find(_plain(self._base((*self.hydra_defaults, *overrides))), f"hydra.{key}")
        except (HydraException, OmegaConfBaseException, yaml.YAMLError, ConfigError):
            return None  # `check` reports the reason

    def choice(self, overrides: Sequence[str], group: str) -> Any:
        """The name of the choice of a group, or a list of names."""
        return _chosen(self._base(tuple(overrides)), group)

    def _base(self, choices: tuple[str, ...]) -> DictConfig:
        """The composed configuration of these choices; Hydra's own section is left out if possible: it is slow."""
        if choices not in self._bases:
            with naming_files(self.folders[1:], choices):
                self._bases[choices] = self._loaded(choices)
        return self._bases[choices]

    def _loaded(self, choices: tuple[str, ...]) -> DictConfig:
        parsed, _ = self.parse(choices)
        sets_hydra = any(override.is_hydra_override() for override in parsed)
        config = None if sets_hydra else self._shared.get(choices) or self._without_hydra(parsed)
        if config is not None:
            self._shared[choices] = config
        return config or self._loader.load_configuration(self.config_name, list(choices), RunMode.RUN, from_shell=False)

    def _without_hydra(self, parsed: list[Override]) -> DictConfig | None:
        """The configuration without Hydra's own section; None if a file sets a group of Hydra."""
        repository = CachingConfigRepository(self._loader.repository)
        try:
            listed = create_defaults_list(repository, self.config_name, parsed, prepend_hydra=False, skip_missing=False)
        except ConfigCompositionException:
            return None
        config = self._loader._compose_config_from_defaults_list(listed.defaults, repository)
        OmegaConf.update(config, "hydra.runtime.choices", listed.overrides.known_choices, force_add=True)
        return config

    def choice_error(self, override: Override) -> str | None:
        """Why an override of a group is invalid; None if it is valid."""
        group, text = override.key_or_group, override.input_line
        if override.is_delete():
            return f"{text}: a group cannot be deleted; choose another, as {group}=none where that is offered"
        if override.is_sweep_override():
            return needs_multirun(override)
        valid = self._loader.repository.get_group_options(group, ObjectType.CONFIG)
        value = override.value()
        for name in value if isinstance(value, list) else [value]:
            if name is not None and str(name) not in valid:
                return f"{text}: no such choice{suggestion(str(name), valid)}; valid: {', '.join(valid)}"
        return None

    def _drop_inapplicable(self, config: DictConfig, chosen: set[str]) -> None:
        """Drop the values of an experiment for a group if another choice was made that has no such key."""
        OmegaConf.set_struct(config, False)
        if "augment" not in self.schema.__dataclass_fields__:
            config.pop("augment", None)  # a data set sets it, for the training
        choices, groups = config.hydra.runtime.choices, self.catalogue.groups
        experiments = [groups.get(group, {}).get(choices.get(group)) for group in EXPERIMENTS]
        for key in (key for experiment in experiments if experiment for key in experiment.values):
            group, name, *_ = (*key.split("."), "")
            if group in chosen and name and not accepts(_plain(config).get(group), name):
                config[group].pop(name, None)

    def _implied(self, groups: Sequence[Override], invalid: set[int]) -> list[Override]:
        """The values that typed choices set in other sections beside an experiment, as overrides whose text says so."""
        typed = {o.key_or_group: o for o in groups if id(o) not in invalid and isinstance(o.value(), str)}
        files = {group: self.catalogue.groups.get(group, {}).get(str(o.value())) for group, o in typed.items()}
        experiment = next((files[group] for group in EXPERIMENTS if files.get(group)), None)
        implied = []
        for group, choice in files.items():
            if not (experiment and choice) or group in GLOBAL_GROUPS | set(EXPERIMENTS) or group.startswith("hydra"):
                continue
            values = implied_values(choice, chooses(experiment, group, choice.name))
            parsed, _ = self.parse([f"{key}={override_literal(value)}" for key, value in values.items()])
            implied += [replace(o, input_line=f"{o.input_line} ({typed[group].input_line})") for o in parsed]
        return implied

    def _apply(self, config: DictConfig, override: Override) -> list[str]:
        """Set one value as Hydra would; returns the error that prevents it, if any."""
        key, text = override.key_or_group, override.input_line
        plain = _plain(config)
        exists = find(plain, key, ABSENT) is not ABSENT
        if override.is_sweep_override():
            return [needs_multirun(override)]
        if not exists and not (override.is_add() or override.is_force_add()):
            return [unknown_key(text or key, key, plain, self.catalogue)]
        if override.is_add() and exists:
            return [f"{text}: {key} is there already; without the + it is replaced"]
        OmegaConf.set_struct(config, False)
        if override.is_delete():
            section, _, leaf = key.rpartition(".")
            OmegaConf.select(config, section).pop(leaf) if section else config.pop(leaf)
        else:
            OmegaConf.update(config, key, self._value(plain, override), merge=True, force_add=True)
        return []

    def _value(self, config: Mapping[str, Any], override: Override) -> Any:
        """The value of an override; what Hydra reads as a number or word of YAML is the text typed where text fits."""
        value, text = override.value(), str(override.input_line).partition("=")[2]
        path, _, name = override.key_or_group.rpartition(".")
        section = find(config, path) if path else {"_target_": f"jepa.config.schema.{self.schema.__name__}"}
        signature = signatures.read_if_known(section.get("_target_")) if isinstance(section, Mapping) else None
        parameter = signature.parameters.get(name) if signature else None
        if parameter is None or (signatures.fits(parameter.type, value) and name not in PATHS):
            return value
        typed = as_typed(value, text)
        return typed if signatures.fits(parameter.type, typed) else value

    def _describe(self, config: DictConfig, overrides: Sequence[Override], path: str) -> str:
        """A key with its value: the override that set it, or the value and the file that holds it."""
        for override in reversed(overrides):
            key = override.key_or_group
            if path == key or path.startswith(f"{key}.") or key.startswith(f"{path}."):
                return override.input_line or key
        value = find(_plain(config), path)
        text = path if isinstance(value, dict) else f"{path}={show_value(value)}"
        file = self._file_of(config, path)
        return f"{text} ({file})" if file else text

    def _file_of(self, config: DictConfig, path: str) -> str | None:
        """The file that sets a key: experiments come last and win, then the choices, then the primary configuration."""
        files = []
        for group in sorted(self.catalogue.groups, key=lambda group: group != "experiment"):
            names = _chosen(config, group)
            files += [self.catalogue.groups[group].get(n) for n in (names if isinstance(names, list) else [names])]
        holders = (
            file for file in [*files, self._primary]
            if file and any(f"{key}.".startswith(f"{path}.") for key in file.values)
        )  # fmt: skip
        return next((file.label for file in holders), None)


@cache
def _compositions(config_name: str) -> dict[tuple[str, ...], DictConfig]:
    """What choices compose of the files of this package, which do not change: for all composers of a process."""
    return {}


def _loader(folders: Sequence[Path]) -> ConfigLoaderImpl:
    """Hydra's own loader; unlike `hydra.initialize`, it does not disturb a Hydra application of the user."""
    if version.getbase() is None:
        version.setbase("1.3")
    setup_globals()
    search_path = create_config_search_path(folders[0].as_uri())
    for folder in folders[1:]:
        search_path.prepend(provider="command-line", path=folder.as_uri(), anchor=SearchPathQuery(provider="schema"))
    loader = ConfigLoaderImpl(search_path)
    loader.repository = _WithoutSchemas(search_path)
    return loader


class _WithoutSchemas(ConfigRepository):
    """Composes without type checks, so that all errors are found and not only the first."""

    def load_config(self, config_path: str) -> ConfigResult | None:
        loaded = super().load_config(config_path)
        if loaded is not None and config_path in SCHEMAS:
            loaded.config = OmegaConf.create()
        return loaded


def _resolved(config: DictConfig) -> dict[str, Any]:
    """Plain values without Hydra's own section, to which they may refer."""
    resolved = {}
    for key in (str(key) for key in config if key != "hydra"):
        value = "???" if OmegaConf.is_missing(config, key) else config[key]
        resolved[key] = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    return resolved


def _chosen(config: DictConfig, group: str) -> Any:
    """The choice of a group, or the keys of a group of several choices, which Hydra does not record."""
    choices = config.hydra.runtime.choices
    return choices[group] if group in choices else list(config.get(group) or ())


def _plain(config: DictConfig) -> dict[str, Any]:
    plain = OmegaConf.to_container(config)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _run_folder(config: DictConfig, sweep_folder: str | None) -> Path:
    if sweep_folder is None:
        return Path(config.hydra.run.dir)
    OmegaConf.update(config, "hydra.job.override_dirname", sweep_folder, force_add=True)
    return Path(config.hydra.sweep.dir) / config.hydra.sweep.subdir


def _existing_run(folder: Path) -> list[str]:
    """An error for resume=false if the run folder exists; rank 0 alone checks, before it writes there."""
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) != "0":
        return []
    files = [name for name in ("config.yaml", "metrics.jsonl", "checkpoints") if (folder / name).exists()]
    if not files:
        return []
    return [f"resume=false: {folder} holds a run already ({', '.join(files)}); give another name= or remove it"]
