"""What commands take over from a trained run unless it is typed: data, and how probes read tokens. Without torch."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from jepa.config.catalogue import Catalogue, Choice, conf_folder
from jepa.config.heads import stored_config
from jepa.config.overrides import override_literal
from jepa.config.urls import is_url, shown
from jepa.errors import ConfigError, FileError


def names_data(overrides: Sequence[str]) -> bool:
    """True if one of the overrides chooses or changes the data set, or takes it from an experiment."""
    keys = [override.partition("=")[0].lstrip("+~") for override in overrides]
    return any(key.split(".")[0] in ("dataset", "experiment") for key in keys)


def run_data(runs: Sequence[str], config_dir: str | os.PathLike | None = None) -> list[str]:
    """Overrides that choose the data set of these runs, with its number of frames; none of sources that are no runs.

    Where a run mirrors nothing, as where left and right are labels, `augment.flip=false` is among them. Raises
    ConfigError if they were trained on different data, or on a data set that is no choice of `dataset=`.
    """
    nodes: dict[str, Mapping[str, Any]] = {}
    mirrors = True
    for run in runs:
        with suppress(ValueError, OSError, FileError):  # the check of the configuration reports what is wrong with it
            config = stored_config(run)
            if "_target_" in config.get("dataset", {}):
                nodes[run] = {"num_frames": config.get("num_frames", 1), **config["dataset"]}
                mirrors = mirrors and (config.get("augment") or {}).get("flip", True)
    if not nodes:
        return []
    first, *others = nodes
    if different := next((run for run in others if _data_of(nodes[run]) != _data_of(nodes[first])), None):
        raise ConfigError([f"run: {first} and {different} were trained on different data; give dataset="])
    folders = [conf_folder()] if config_dir is None else [Path(config_dir).absolute(), conf_folder()]
    overrides = _as_overrides(first, nodes[first], Catalogue(folders).groups["dataset"].values())
    return overrides if mirrors else [*overrides, "augment.flip=false"]


def run_readouts(runs: Sequence[str], probes: Collection[str]) -> list[str]:
    """Overrides by which these probes read tokens as in these runs, as far as the runs agree."""
    found: list[dict[str, str]] = []
    for run in runs:
        with suppress(ValueError, OSError, FileError):
            evaluators = stored_config(run).get("evaluator") or {}
            found.append({name: evaluators[name].get("readout", "mean") for name in probes if name in evaluators})
    agreed = set.intersection(*(set(readouts.items()) for readouts in found)) if found else set()
    return [f"evaluator.{name}.readout={readout}" for name, readout in sorted(agreed)]


def _data_of(node: Mapping[str, Any]) -> dict[str, Any]:
    """What decides about the data: not the folder of copies."""
    return {key: value for key, value in node.items() if key not in ("cache", "cache_size")}


def _as_overrides(run: str, node: Mapping[str, Any], choices: Any) -> list[str]:
    """The choice of a data set that is most like the node, and the keys in which it differs."""
    values = {f"dataset.{key}": value for key, value in node.items() if key not in ("_target_", "num_frames")}
    same = [choice for choice in choices if choice.values.get("dataset._target_") == node["_target_"]]
    if not same:
        raise ConfigError([f"run={run}: was trained on {node['_target_']}, which is no choice here; give dataset="])
    choice = min(same, key=lambda choice: len(_changes(choice, values)))
    changes = _changes(choice, values)
    settings = [f"{'' if key in choice.values else '++'}{key}={override_literal(changes[key])}" for key in changes]
    return [f"dataset={choice.name}", *settings, f"num_frames={node['num_frames']}"]


def _changes(choice: Choice, values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if choice.values.get(key, ...) != value}


def describe_data(node: Mapping[str, Any]) -> str:
    """A data set in a few words: its class, and the file or folder that it reads."""
    part = node.get("image_folder") or node.get("video_folder") or ""
    place = node.get("path") or node.get("shards") or node.get("root_path")
    name = str(node.get("_target_", "")).rpartition(".")[2]
    if is_url(place):
        return f"{name} of {shown(str(place))}"
    return f"{name} {node['name']}" if node.get("name") else f"{name} of {Path(str(place)) / part}" if place else name
