"""Composes a configuration with Hydra's own loader and finds all that is wrong with it at once, without torch."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
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
from hydra.core.override_parser.types import IntervalSweep, Override, Quote, QuotedString
from hydra.core.utils import setup_globals
from hydra.errors import ConfigCompositionException, HydraException
from hydra.plugins.config_source import ConfigResult
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from jepa.config import signatures
from jepa.config.catalogue import Catalogue, Choice, conf_folder, find
from jepa.config.schema import EvalConfig, ExportConfig, TrainConfig, show_value
from jepa.config.values import (
    accepts,
    given_size,
    idle_evaluators,
    unknown_key,
    unused_override,
    unused_sections,
    without_sizes,
)
from jepa.config.values import faults as value_faults
from jepa.errors import ConfigError
from jepa.suggestions import suggestion

ABSENT = object()
SCHEMAS = {"schema": TrainConfig, "eval_schema": EvalConfig, "export_schema": ExportConfig}
"""Name in a defaults list -> what our own code reads of a configuration that begins with it."""
WITHOUT_HYDRA = {"eval": EvalConfig, "export": ExportConfig}
"""Primary configurations that are composed and checked like the others, but start no job of Hydra."""


def _choice(group: str, *, _root_: DictConfig) -> str:
    """`${choice:GROUP}` in a configuration: the name of what is chosen, before and inside a job."""
    hydra = _root_.get("hydra") or HydraConfig.get()
    return str(hydra.runtime.choices[group])


for _name, _schema in SCHEMAS.items():
    ConfigStore.instance().store(name=_name, node=_schema)
OmegaConf.register_new_resolver("choice", _choice, replace=True)


def override_literal(value: Any) -> str:
    """A Python value as the right side of an override."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{override_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(override_literal, value)) + "]"
    if not isinstance(value, str | os.PathLike):
        return show_value(value)
    text = os.fspath(value)
    is_plain = re.fullmatch(r"[A-Za-z_./][\w./-]*", text, re.ASCII) and text.lower() not in (
        "true",
        "false",
        "null",
        "nan",
        "inf",
    )
    return text if is_plain else QuotedString(text, Quote.single).with_quotes()


class Inspection(NamedTuple):
    config: dict[str, Any]
    """resolved, with what is not given as "???"; empty when it could not be composed"""
    faults: list[str]


class Composer:
    """Composes and checks configurations; remembers what the same choices compose to, for the members of a sweep."""

    def __init__(self, config_dir: str | os.PathLike | None = None, config_name: str = "train") -> None:
        self.config_name = config_name.removesuffix(".yaml")
        self.folders = [conf_folder()]
        if config_dir is not None:
            self.folders.append(Path(config_dir).absolute())
            if not self.folders[-1].is_dir():
                raise ConfigError([f"--config-dir {config_dir}: there is no folder {self.folders[-1]}"])
        self.catalogue = Catalogue(self.folders)
        self.schema = WITHOUT_HYDRA.get(self.config_name, TrainConfig)
        self.settings = [] if self.config_name in {"train", *WITHOUT_HYDRA} else self._hydra_settings()
        self._loader = _loader(self.folders)
        self._bases: dict[tuple[str, ...], DictConfig] = {}
        self._parsed: dict[str, Override] = {}

    @cached_property
    def _primary(self) -> Choice | None:
        paths = (folder / f"{self.config_name}.yaml" for folder in self.folders)
        return next((Choice("", self.config_name, path) for path in paths if path.is_file()), None)

    @cached_property
    def _chosen_here(self) -> set[str]:
        """The groups of train.yaml of which a primary configuration that extends it makes another choice."""
        return set(re.findall(r"^ *- override ([\w/]+):", self._primary.text, re.MULTILINE)) if self._primary else set()

    def _hydra_settings(self) -> list[str]:
        """Overrides that give another primary configuration the settings of Hydra in train.yaml that it lacks."""
        if self._chosen_here:
            return []
        own = self._primary.values if self._primary else {}
        ours = Choice("", "train", self.folders[0] / "train.yaml").values.items()
        return [f"{k}={override_literal(v)}" for k, v in ours if k.startswith("hydra.") and k not in own]

    def inspect(self, overrides: Sequence[str], sweep_folder: str | None = None) -> Inspection:
        """Compose with overrides and collect all faults; `sweep_folder` is the name of this member of a sweep."""
        parsed, faults = self.parse(overrides)
        groups = [override for override in parsed if self.is_group(override)]
        wrong = {id(override): fault for override in groups if (fault := self.choice_fault(override))}
        faults += wrong.values()
        chosen = self.settings + [
            o.input_line or "" for o in parsed if id(o) not in wrong and (o in groups or o.is_hydra_override())
        ]
        try:
            base = self._base(tuple(chosen))
        except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
            return Inspection({}, [*faults, _of_hydra(error)])
        config = base.copy()
        self._drop_foreign(config, {override.key_or_group for override in groups} | self._chosen_here)
        values = [override for override in parsed if override not in groups and not override.is_hydra_override()]
        for override in values:
            faults += self._apply(config, override)
        schema = signatures.read(f"jepa.config.schema.{self.schema.__name__}")
        assert schema is not None
        show = partial(self._show, config, values)
        try:
            plain = _resolved(config)
            if self.schema is TrainConfig:
                empty, idle = unused_sections(plain), idle_evaluators(plain)
                sized = without_sizes(plain)
                faults += [*self._needless(parsed, empty, base), *self._idle(parsed, idle, base)]
                faults += self._sizes_given(parsed, base) if sized else []
                plain |= empty | sized
                plain["evaluator"] = {k: v for k, v in (plain.get("evaluator") or {}).items() if k not in idle}
            faults += value_faults(plain, schema, show)
            if plain.get("resume") is False:
                faults += _existing_run(config, sweep_folder)
        except OmegaConfBaseException as error:
            return Inspection({}, [*faults, _of_hydra(error)])
        return Inspection(plain, faults)

    def parse(self, overrides: Sequence[str]) -> tuple[list[Override], list[str]]:
        """Overrides as Hydra reads them, and the faults of those that it cannot read."""
        faults = []
        for text in overrides:
            if text not in self._parsed:
                try:
                    self._parsed[text] = OverridesParser.create(self._loader).parse_override(text)
                except HydraException:
                    faults.append(_syntax(text))
        return [self._parsed[text] for text in dict.fromkeys(overrides) if text in self._parsed], faults

    def is_group(self, override: Override) -> bool:
        return override.key_or_group in self.catalogue.groups or override.key_or_group.startswith("hydra/")

    def default(self, overrides: Sequence[str]) -> dict[str, Any]:
        """The configuration of these choices, resolved but not checked."""
        return _resolved(self._base(tuple(overrides)))

    def hydra_setting(self, overrides: Sequence[str], key: str) -> Any:
        """A value of Hydra's own section that the chosen files give it, None without; nothing is resolved."""
        try:
            return find(_plain(self._base((*self.settings, *overrides))), f"hydra.{key}")
        except (HydraException, OmegaConfBaseException, yaml.YAMLError):
            return None  # `inspect` tells why

    def choice(self, overrides: Sequence[str], group: str) -> Any:
        """The name of what is chosen of a group, or the list of names."""
        return _chosen(self._base(tuple(overrides)), group)

    def _base(self, choices: tuple[str, ...]) -> DictConfig:
        if choices not in self._bases:
            asks_hydra = any(override.is_hydra_override() for override in self.parse(choices)[0])
            self._bases[choices] = self._whole(choices) if asks_hydra else self._quick(choices)
        return self._bases[choices]

    def _whole(self, overrides: Sequence[str]) -> DictConfig:
        return self._loader.load_configuration(self.config_name, list(overrides), RunMode.RUN, from_shell=False)

    def _quick(self, choices: Sequence[str]) -> DictConfig:
        """Without Hydra's own section, which takes most of the time; but where a file sets a group of Hydra."""
        repository = CachingConfigRepository(self._loader.repository)
        parsed, _ = self.parse(choices)
        try:
            listed = create_defaults_list(repository, self.config_name, parsed, prepend_hydra=False, skip_missing=False)
        except ConfigCompositionException:
            return self._whole(choices)
        config = self._loader._compose_config_from_defaults_list(listed.defaults, repository)
        OmegaConf.update(config, "hydra.runtime.choices", listed.overrides.known_choices, force_add=True)
        return config

    def choice_fault(self, override: Override) -> str | None:
        """Why a group cannot be set so; None when it can."""
        group, text = override.key_or_group, override.input_line
        if override.is_delete():
            return f"{text}: a group cannot be deleted; choose another, as {group}=none where that is offered"
        if override.is_sweep_override():
            return _needs_multirun(override)
        valid = self._loader.repository.get_group_options(group, ObjectType.CONFIG)
        value = override.value()
        for name in value if isinstance(value, list) else [value]:
            if name is not None and str(name) not in valid:
                return f"{text}: no such choice{suggestion(str(name), valid)}; valid: {', '.join(valid)}"
        return None

    def _drop_foreign(self, config: DictConfig, chosen: set[str]) -> None:
        """Takes out what an experiment sets for its choice of a group, where another was made that has no such key."""
        experiment = self.catalogue.groups.get("experiment", {}).get(config.hydra.runtime.choices.get("experiment"))
        for key in experiment.values if experiment else ():
            group, name, *_ = (*key.split("."), "")
            if group in chosen and name and not accepts(_plain(config).get(group), name):
                OmegaConf.set_struct(config, False)
                config[group].pop(name, None)

    def _needless(self, overrides: Sequence[Override], unused: Mapping[str, Any], base: DictConfig) -> Iterator[str]:
        """A fault for each override of a section that the chosen objective does not use."""
        for override in overrides:
            section = override.key_or_group.partition(".")[0]
            if section in unused and override.value() != "none":
                text, choice = override.input_line or section, _chosen(base, "objective")
                yield unused_override(text, section, choice)

    def _idle(self, overrides: Sequence[Override], idle: Sequence[str], base: DictConfig) -> Iterator[str]:
        """A fault for each override of an evaluator that has nothing to look at."""
        for override in overrides:
            section, _, rest = override.key_or_group.partition(".")
            names = override.value() if section == "evaluator" and not rest else rest.partition(".")[0]
            for name in names if isinstance(names, list) else [names]:
                if section == "evaluator" and name in idle:
                    text, choice = override.input_line or section, _chosen(base, "objective")
                    yield f"{text}: objective={choice} gives {name} nothing to look at; leave it out"

    def _sizes_given(self, overrides: Sequence[Override], base: DictConfig) -> list[str]:
        """A fault for each override of a size where the weights of the encoder say how large it is."""
        encoder = _chosen(base, "encoder")
        pairs = ((override.key_or_group, override.input_line or override.key_or_group) for override in overrides)
        return [fault for key, text in pairs if (fault := given_size(key, text, encoder))]

    def _apply(self, config: DictConfig, override: Override) -> list[str]:
        """Set one value as Hydra would; the faults that prevent it."""
        key, text = override.key_or_group, override.input_line
        plain = _plain(config)
        is_there = find(plain, key, ABSENT) is not ABSENT
        if override.is_sweep_override():
            return [_needs_multirun(override)]
        if not is_there and not (override.is_add() or override.is_force_add()):
            return [unknown_key(text or key, key, plain, self.catalogue)]
        if override.is_add() and is_there:
            return [f"{text}: {key} is there already; without the + it is replaced"]
        OmegaConf.set_struct(config, False)
        if override.is_delete():
            section, _, leaf = key.rpartition(".")
            OmegaConf.select(config, section).pop(leaf) if section else config.pop(leaf)
        else:
            OmegaConf.update(config, key, override.value(), merge=True, force_add=True)
        return []

    def _show(self, config: DictConfig, overrides: Sequence[Override], path: str) -> str:
        """A key with its value, as the user wrote it or with the file that holds it."""
        for override in reversed(overrides):
            key = override.key_or_group
            if path == key or path.startswith(f"{key}.") or key.startswith(f"{path}."):
                return override.input_line or key
        value = find(_plain(config), path)
        shown = path if isinstance(value, dict) else f"{path}={show_value(value)}"
        file = self._file(config, path)
        return f"{shown} ({file})" if file else shown

    def _file(self, config: DictConfig, path: str) -> str | None:
        """The file that sets a key: experiments come last and win, then the choices, then the primary configuration."""
        groups = sorted(self.catalogue.groups, key=lambda group: group != "experiment")
        chosen = ((group, _chosen(config, group)) for group in groups)
        named = [(group, name) for group, names in chosen for name in (names if isinstance(names, list) else [names])]
        choices = [found for group, name in named if (found := self.catalogue.groups.get(group, {}).get(name))]
        files = (folder / f"{self.config_name}.yaml" for folder in self.folders)
        primary = [Choice("", file.stem, file) for file in files if file.is_file()]
        holders = (c for c in [*choices, *primary] if any(f"{key}.".startswith(f"{path}.") for key in c.values))
        return next((choice.label for choice in holders), None)


def members(parsed: Sequence[Override]) -> Iterator[list[str]]:
    """The overrides of every single run of a sweep; of an interval both ends."""
    axes = []
    for override in parsed:
        key, values = override.get_key_element(), override.value()
        if isinstance(values, IntervalSweep):
            axes.append([f"{key}={values.start}", f"{key}={values.end}"])
        elif override.is_sweep_override():
            axes.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        else:
            axes.append([override.input_line or ""])
    for member in itertools.product(*axes):
        yield list(member)


def _loader(folders: Sequence[Path]) -> ConfigLoaderImpl:
    """Hydra's own loader over the folders; unlike `hydra.initialize` it leaves an application of the user alone."""
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
    """Lets wrong keys and types pass while composing, so that all of them are found and not only the first."""

    def load_config(self, config_path: str) -> ConfigResult | None:
        loaded = super().load_config(config_path)
        if loaded is not None and config_path in SCHEMAS:
            loaded.config = OmegaConf.create()
        return loaded


def _resolved(config: DictConfig) -> dict[str, Any]:
    """Plain values of all but Hydra's own section, to which they may refer."""
    resolved = {}
    for key in (str(key) for key in config if key != "hydra"):
        value = "???" if OmegaConf.is_missing(config, key) else config[key]
        resolved[key] = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    return resolved


def _chosen(config: DictConfig, group: str) -> Any:
    """Hydra does not record what was chosen by a list; each choice of such a group has its name as its key."""
    choices = config.hydra.runtime.choices
    return choices[group] if group in choices else list(config.get(group) or ())


def _plain(config: DictConfig, resolve: bool = False) -> dict[str, Any]:
    plain = OmegaConf.to_container(config, resolve=resolve)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _existing_run(config: DictConfig, sweep_folder: str | None) -> list[str]:
    """With resume=false the run folder must be new; of several processes of a run only the first looks."""
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) != "0":
        return []
    folder = Path(config.hydra.run.dir)
    if sweep_folder is not None:
        OmegaConf.update(config, "hydra.job.override_dirname", sweep_folder, force_add=True)
        folder = Path(config.hydra.sweep.dir) / config.hydra.sweep.subdir
    kept = [name for name in ("config.yaml", "metrics.jsonl", "checkpoints") if (folder / name).exists()]
    if not kept:
        return []
    return [f"resume=false: {folder} holds a run already ({', '.join(kept)}); give another name= or remove it"]


def _needs_multirun(override: Override) -> str:
    as_list = f"{override.key_or_group}=[{override.get_value_string()}]"
    return f"{override.input_line}: several values need --multirun, which runs one after the other; a list is {as_list}"


def _syntax(text: str) -> str:
    """What is probably wrong with an override that cannot be read."""
    if "=" not in text:
        return f"{text}: cannot be read; an override is KEY=VALUE"
    key, _, value = text.partition("=")
    return f"{text}: cannot be read; quote special characters, as '{key}=\"{value}\"' with both kinds of quotes"


def _of_hydra(error: Exception) -> str:
    """Hydra's own words for what it could not compose, on one line."""
    reason = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    lines = [line.strip() for line in f"{reason}".splitlines() if line.strip() and "full_key" not in line]
    return " ".join(line for line in lines if not line.startswith("object_type"))
