"""Checks of the keys and values of a configuration, before anything is built: plain dicts, without torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from jepa.config import signatures
from jepa.config.catalogue import Catalogue, Choice, components, find, flatten
from jepa.config.rules import rule_errors
from jepa.config.view import ConfigView, Describe
from jepa.suggestions import nearest, suggestion

RUNTIME_ARGUMENTS = {
    "encoder": {"clip_shape"},
    "mask": {"grid"},
    "predictor": {"grid", "embed_dim", "num_mask_tokens", "fields"},
    "objective": {
        *("encoder", "predictor", "regularizers", "num_mask_tokens", "classes", "fields", "batch_size", "total_steps")
    },
    "dataset": {"num_frames"},
    "regularizer": set(),
    "optimizer": {"params", "lr", "weight_decay"},
    "schedule": {"total_steps", "steps_per_epoch", "lr"},
    "evaluator": set(),
    "env": set(),
    "policy": set(),
    "planner": set(),
    "cost": set(),
    "logger": {"folder", "config", "run_id", "resume_step"},
}
"""Group -> constructor arguments that the program passes; they are no keys."""
SECTIONS = {"augment", "evaluation", "hardware"}
"""Keys of a schema whose values have a dataclass of their own, named in the annotation."""
OPTIONAL = {"regularizer", "evaluator", "logger", "cost"}
"""Groups of which none or several choices run together, each under its own name."""
SECTION_CONSUMERS = {
    "predictor": {"predictor"},
    "regularizer": {"regularizers"},
    "mask": {"predictor", "num_mask_tokens"},
}
"""Section -> arguments of an objective; one that takes any of them uses the section."""
EMPTY_SECTION = {"predictor": {}, "regularizer": {}, "mask": {"_target_": "jepa.masks.none.NoMask"}}
"""Contents of a section that the objective does not use."""
SIZES = {"embed_dim", "depth", "num_heads", "mlp_ratio"}
"""Keys of `size=`; an encoder whose weights determine its size takes none of them."""


def unused_sections(config: Mapping[str, Any]) -> dict[str, Any]:
    """The sections that the objective of a configuration does not use, each with its empty contents."""
    arguments = _arguments(config, "objective")
    return {
        name: EMPTY_SECTION[name] for name, consumers in SECTION_CONSUMERS.items()
        if arguments and not consumers & arguments
    }  # fmt: skip


def without_unused(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration without the sections, evaluators and sizes that its objective and encoder do not use."""
    used = {**config, **unused_sections(config)}
    if _has_fixed_size(config):
        used["encoder"] = {key: value for key, value in config["encoder"].items() if key not in SIZES}
    idle, evaluators = _idle_evaluators(config), config.get("evaluator") or {}
    return used | {"evaluator": {name: node for name, node in evaluators.items() if name not in idle}}


def unused_overrides(
    overrides: Iterable[tuple[str, Any, str]], config: Mapping[str, Any], objective: str, encoder: str
) -> Iterator[str]:
    """An error for each override (key, value, text) that has no effect with the chosen objective or encoder."""
    unused, idle, has_fixed_size = unused_sections(config), _idle_evaluators(config), _has_fixed_size(config)
    for key, value, text in overrides:
        section, _, rest = key.partition(".")
        if section in unused and value != "none":
            yield f"{text}: objective={objective} uses no {section}; leave it out"
        names = rest.partition(".")[0] if rest else value
        for name in names if isinstance(names, list) else [names]:
            if section == "evaluator" and name in idle:
                yield f"{text}: objective={objective} gives {name} nothing to look at; leave it out"
        if has_fixed_size and (key == "size" or key.removeprefix("encoder.") in SIZES):
            yield f"{text}: encoder={encoder} has the sizes of its weights; leave it out"


def _has_fixed_size(config: Mapping[str, Any]) -> bool:
    arguments = _arguments(config, "encoder")
    return bool(arguments) and not arguments & SIZES


def _arguments(config: Mapping[str, Any], group: str) -> set[str]:
    """Argument names of the constructor of a group; empty if unknown."""
    node = config.get(group)
    signature = signatures.read_if_known(node.get("_target_")) if isinstance(node, Mapping) else None
    return set() if signature is None or signature.has_kwargs else set(signature.parameters)


def _idle_evaluators(config: Mapping[str, Any]) -> list[str]:
    """Names of the evaluators for boxes, classes of a head, or features that the objective does not predict."""
    predicted = signatures.traits(str((config.get("objective") or {}).get("_target_"))).get("predicts")
    nodes = {name: node for name, node in (config.get("evaluator") or {}).items() if isinstance(node, Mapping)}
    judged = {name: signatures.traits(str(node.get("_target_"))).get("judges") for name, node in nodes.items()}
    return [name for name, kind in judged.items() if _is_idle(kind, predicted)]


def _is_idle(judged: str | None, predicted: str | None) -> bool:
    """Detectors are evaluated on boxes alone; evaluators and objectives that declare nothing always fit."""
    if "boxes" in (judged, predicted):
        return judged is not None and judged != predicted
    return judged == "classes" and predicted not in (None, "classes")


def value_errors(
    config: Mapping[str, Any], schema: signatures.Signature, describe: Describe, *, needs_data: bool = True
) -> list[str]:
    """All errors of a composed configuration, one sentence each."""
    invalid = dict(_invalid_values(config, schema, describe))
    missing = [f"{describe(key)}: must be given, as {key}=VALUE" for key, value in flatten(config) if value == "???"]
    return [*invalid.values(), *rule_errors(ConfigView(config, describe, set(invalid), needs_data)), *missing]


def unknown_key(text: str, key: str, config: Mapping[str, Any], catalogue: Catalogue) -> str:
    """Why the override `text` sets nothing: which choice has such a key, or which key was meant."""
    section, _, leaf = key.rpartition(".")
    group = key.partition(".")[0]
    if choices := catalogue.keys.get(key):
        return f"{text}: the chosen {group} has no {leaf!r}; {_join(choices)} has"
    node = find(config, section) if section else None
    signature = signatures.read_if_known(node.get("_target_")) if isinstance(node, Mapping) else None
    if node and signature and leaf in signature.parameters.keys() - RUNTIME_ARGUMENTS.get(group, set()):
        return f"{text}: is not in the configuration, but {node['_target_']} takes it: write +{text}"
    present = {path for path, _ in flatten(config) if not path.startswith("hydra.") and not path.endswith("_target_")}
    near = nearest(key, present | set(catalogue.groups) | set(catalogue.keys))
    absent = catalogue.keys.keys() - present
    hints = [f'"{name}"' + (f" (with {_join(catalogue.keys[name])})" if name in absent else "") for name in near]
    ending = f"did you mean {' or '.join(hints)}?" if hints else "jepa-train --help lists them"
    return f'{text}: there is no key "{key}"; {ending}'


def _join(choices: Sequence[Choice]) -> str:
    return f"{choices[0].group}={', '.join(choice.name for choice in choices)}"


def accepts(node: Any, name: str) -> bool:
    """True if the choice of a group takes an argument or has a part of that name, or if this is unknown."""
    if not isinstance(node, Mapping):
        return True
    target = node.get("_target_")
    if target is None and isinstance(node.get(name), Mapping):
        return "_target_" in node[name]
    signature = signatures.read_if_known(target)
    return signature is None or signature.accepts(name)


def _invalid_values(
    config: Mapping[str, Any], schema: signatures.Signature, describe: Describe
) -> Iterator[tuple[str, str]]:
    """(key, message) for every unknown key, every value of the wrong type and every missing argument."""
    groups = {group: runtime for group, runtime in RUNTIME_ARGUMENTS.items() if group in schema.parameters}
    plain = {key: value for key, value in config.items() if key not in groups}
    yield from _check_arguments(schema, plain, "", describe, runtime=set(groups))
    for name in SECTIONS & schema.parameters.keys():
        section = signatures.describe(schema.parameters[name].type)
        signature, values = signatures.read(f"jepa.config.schema.{section}"), config.get(name)
        if signature is not None and isinstance(values, Mapping):
            yield from _check_arguments(signature, values, f"{name}.", describe, runtime=set())
        elif signature is not None:
            keys = ", ".join(signature.parameters)
            yield name, f"{describe(name)}: takes the keys {keys}, not {signatures.describe_value(values)}"
    optional = OPTIONAL | unused_sections(config).keys()
    optional |= {group for group in groups if signatures.fits(schema.parameters[group].type, None)}
    for group, runtime in groups.items():
        section = config.get(group) or {}
        parts = {f"{group}.{name}": part for name, part in section.items()} if group in OPTIONAL else {group: section}
        for path, part in parts.items():
            if part or group not in optional:
                yield from _check_component(path, part, runtime, describe)
        for path, inner in components(section, f"{group}."):
            if path not in parts:
                yield from _check_component(path, inner, runtime & {"num_frames"}, describe)


def _check_component(path: str, node: Any, runtime: set[str], describe: Describe) -> Iterator[tuple[str, str]]:
    target = node.get("_target_") if isinstance(node, Mapping) else None
    if not isinstance(target, str):
        yield path, f"{path}: lacks a _target_, the class to build ({describe(path)})"
        return
    try:
        signature = signatures.read(target)
    except LookupError as error:
        yield f"{path}._target_", f"{describe(f'{path}._target_')}: {error.args[0]}"
        return
    if signature is not None:
        arguments = {key: value for key, value in node.items() if not key.startswith("_")}
        yield from _check_arguments(signature, arguments, f"{path}.", describe, runtime)


def _check_arguments(
    signature: signatures.Signature, values: Mapping[str, Any], prefix: str, describe: Describe, runtime: set[str]
) -> Iterator[tuple[str, str]]:
    """Errors of the values for a constructor, which gets the arguments `runtime` from the program."""
    valid = [name for name in signature.parameters if name not in runtime]
    for name, value in values.items():
        key = f"{prefix}{name}"
        if name in runtime:
            yield key, f"{describe(key)}: is worked out by the program, it cannot be set{_instead(name)}"
        elif not signature.accepts(name):
            reader = signature.name if prefix else "the program"
            yield key, f"{describe(key)}: {reader} has no {name!r}{suggestion(name, valid)}"
        elif name in signature.parameters and (error := _argument_error(signature.parameters[name], key, value)):
            yield key, f"{describe(key)}: {error}"
    for name in valid:
        key = f"{prefix}{name}"
        if signature.parameters[name].is_required and name not in values:
            yield key, f"{key}: is lacking, {signature.name} needs it; add +{key}=VALUE"


def _argument_error(parameter: signatures.Parameter, key: str, value: Any) -> str | None:
    if value == "???" or (isinstance(value, Mapping) and "_target_" in value):
        return None
    if key == "predictor.num_heads" and value is None:
        return None  # as many as the encoder has
    if key == "name" and type(value) is int:
        return None  # `name: 2024` in a file is a name
    return signatures.value_error(parameter.type, parameter.name, value)


def _instead(name: str) -> str:
    keys = {"weight_decay": "schedule.weight_decay"} | {key: key for key in ("lr", "batch_size", "num_frames")}
    return f"; use {keys[name]}" if name in keys else ""
