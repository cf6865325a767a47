"""What a configuration cannot be: refused in words before anything is built. Works on plain dicts, without torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jepa.config import signatures
from jepa.config.catalogue import Catalogue, Choice, find, flatten
from jepa.config.rules import faults_between
from jepa.config.view import ConfigView, Describe
from jepa.suggestions import nearest, suggestion

OF_DATA = {"classes", "fields"}
RUNTIME_ARGUMENTS = {
    "encoder": {"clip_shape"},
    "mask": {"grid"},
    "predictor": {"grid", "embed_dim", "num_mask_tokens"},
    "objective": {"encoder", "predictor", "regularizers", "num_mask_tokens", *OF_DATA, "batch_size", "total_steps"},
    "dataset": {"num_frames"},
    "regularizer": set(),
    "optimizer": {"params", "lr", "weight_decay"},
    "schedule": {"total_steps", "steps_per_epoch", "lr"},
    "evaluator": set(),
    "logger": {"folder", "config", "run_id", "resume_step"},
}
"""Group -> the constructor arguments that Python gives; they are no keys."""
SECTIONS = {"augment", "evaluation", "hardware"}
"""Keys of a schema that have a schema of their own, which is named where they are declared."""
MANY = {"regularizer", "evaluator", "logger"}
"""Groups of which several choices run together, each under its own name."""
OPTIONAL = {"regularizer", "evaluator", "logger"}
SECTION_CONSUMERS = {
    "predictor": {"predictor"},
    "regularizer": {"regularizers"},
    "mask": {"predictor", "num_mask_tokens"},
}
"""Section -> the arguments of an objective of which it takes one or more when it uses the section."""
EMPTY_SECTION = {"predictor": {}, "regularizer": {}, "mask": {"_target_": "jepa.masks.none.NoMask"}}
"""What stands in a section that the objective does not use."""

SIZES = {"embed_dim", "depth", "num_heads", "mlp_ratio"}
"""The keys of `size=`, which an encoder takes none of whose weights say how large it is."""


def unused_sections(config: Mapping[str, Any]) -> dict[str, Any]:
    """The sections that the objective of a configuration has no use for, with what is to stand there instead."""
    taken = _arguments(config, "objective")
    return {name: EMPTY_SECTION[name] for name, takes in SECTION_CONSUMERS.items() if taken and not takes & taken}


def without_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """The section of an encoder that takes no sizes, without those that `size=` gives every encoder."""
    taken = _arguments(config, "encoder")
    if not taken or taken & SIZES:
        return {}
    return {"encoder": {key: value for key, value in config["encoder"].items() if key not in SIZES}}


def given_size(key: str, text: str, encoder: str) -> str | None:
    """Why the override `text` is refused where an encoder takes no sizes; None where it sets none."""
    if key != "size" and key.removeprefix("encoder.") not in SIZES:
        return None
    return f"{text}: encoder={encoder} has the sizes of its weights; leave it out"


def _arguments(config: Mapping[str, Any], group: str) -> set[str]:
    """What the constructor of a group takes; empty where nobody can tell."""
    try:
        signature = signatures.read((config.get(group) or {}).get("_target_", ""))
    except (LookupError, AttributeError):
        return set()
    return set() if signature is None or signature.takes_more else set(signature.parameters)


def unused_override(text: str, section: str, choice: str) -> str:
    """Why the override `text` of a section that the chosen objective does not use is refused."""
    return f"{text}: objective={choice} uses no {section}; leave it out"


def idle_evaluators(config: Mapping[str, Any]) -> list[str]:
    """Names of the evaluators that judge what the objective does not predict: boxes, classes of a head, or features."""
    predicted = signatures.traits(str((config.get("objective") or {}).get("_target_"))).get("predicts")
    nodes = {name: node for name, node in (config.get("evaluator") or {}).items() if isinstance(node, Mapping)}
    judged = {name: signatures.traits(str(node.get("_target_"))).get("judges") for name, node in nodes.items()}
    return [name for name, what in judged.items() if _is_idle(what, predicted)]


def _is_idle(judged: str | None, predicted: str | None) -> bool:
    """With boxes nothing but boxes is judged; evaluators and objectives that say nothing are left alone."""
    if "boxes" in (judged, predicted):
        return judged is not None and judged != predicted
    return judged == "classes" and predicted not in (None, "classes")


def faults(config: Mapping[str, Any], schema: signatures.Signature, show: Describe) -> list[str]:
    """All that is wrong with a composed configuration, one sentence each."""
    found = dict(_wrong_values(config, schema, show))
    missing = [f"{show(key)}: must be given, as {key}=VALUE" for key, value in flatten(config) if value == "???"]
    checked = ConfigView(config, show, set(found))
    return [*found.values(), *faults_between(checked), *missing]


def unknown_key(text: str, key: str, config: Mapping[str, Any], catalogue: Catalogue) -> str:
    """Why the override `text` sets nothing: what has such a key, or which key was meant."""
    section, _, leaf = key.rpartition(".")
    group = key.partition(".")[0]
    if others := catalogue.keys.get(key):
        return f"{text}: the chosen {group} has no {leaf!r}; {_choices(others)} has"
    node = find(config, section) if section else None
    if isinstance(node, Mapping) and _takes(node.get("_target_"), leaf, group):
        return f"{text}: is not in the configuration, but {node['_target_']} takes it: write +{text}"
    known = {path for path, _ in flatten(config) if not path.startswith("hydra.") and not path.endswith("_target_")}
    near = nearest(key, known | set(catalogue.groups) | set(catalogue.keys))
    elsewhere = {
        name: f" (with {_choices(catalogue.keys[name])})" for name in near if name in catalogue.keys.keys() - known
    }
    meant = " or ".join(f'"{name}"{elsewhere.get(name, "")}' for name in near)
    return f'{text}: there is no key "{key}"' + (
        f"; did you mean {meant}?" if meant else "; jepa-train --help lists them"
    )


def _choices(choices: Sequence[Choice]) -> str:
    return f"{choices[0].group}={', '.join(choice.name for choice in choices)}"


def accepts(node: Any, name: str) -> bool:
    """Whether what is chosen of a group takes an argument, or has a part of that name; also where nobody can tell."""
    target = node.get("_target_") if isinstance(node, Mapping) else None
    if target is None and isinstance(node, Mapping) and isinstance(node.get(name), Mapping):
        return "_target_" in node[name]
    try:
        signature = signatures.read(target) if isinstance(target, str) else None
    except LookupError:
        return True
    return signature is None or signature.takes_more or name in signature.parameters


def _takes(target: Any, name: str, group: str) -> bool:
    try:
        signature = signatures.read(target) if isinstance(target, str) else None
    except LookupError:
        return False
    return signature is not None and name in signature.parameters and name not in RUNTIME_ARGUMENTS.get(group, set())


def _wrong_values(config: Mapping[str, Any], schema: signatures.Signature, show: Describe) -> Iterator[tuple[str, str]]:
    """(key, sentence) of every key that nothing reads, of every value of the wrong type, of what is lacking."""
    groups = {group: wired for group, wired in RUNTIME_ARGUMENTS.items() if group in schema.parameters}
    plain = {key: value for key, value in config.items() if key not in groups}
    yield from _against(schema, plain, "", show, given=set(groups))
    for name in SECTIONS & schema.parameters.keys():
        own = signatures.describe(schema.parameters[name].annotation)
        signature, values = signatures.read(f"jepa.config.schema.{own}"), config.get(name)
        if signature is not None and isinstance(values, Mapping):
            yield from _against(signature, values, f"{name}.", show, given=set())
        elif signature is not None:
            yield name, f"{show(name)}: takes the keys {', '.join(signature.parameters)}, not {signatures.show(values)}"
    for group, wired in groups.items():
        node = config.get(group) or {}
        for path, part in ((f"{group}.{name}", node[name]) for name in node) if group in MANY else [(group, node)]:
            if part or group not in OPTIONAL | unused_sections(config).keys():
                yield from _component(path, part, wired, show)


def _component(path: str, node: Any, wired: set[str], show: Describe) -> Iterator[tuple[str, str]]:
    target = node.get("_target_") if isinstance(node, Mapping) else None
    if not isinstance(target, str):
        yield path, f"{path}: lacks a _target_, the class to build ({show(path)})"
        return
    try:
        signature = signatures.read(target)
    except LookupError as error:
        yield f"{path}._target_", f"{show(f'{path}._target_')}: {error.args[0]}"
        return
    arguments = {key: value for key, value in node.items() if not key.startswith("_")}
    if signature is not None:
        yield from _against(signature, arguments, f"{path}.", show, given=wired)
    for key, node in _nested(path, arguments):
        yield from _component(key, node, wired & {"num_frames"}, show)


def _nested(path: str, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The components that are arguments of another one, at any depth of its mappings."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            inner = f"{path}.{key}"
            yield from [(inner, value)] if "_target_" in value else _nested(inner, value)


def _against(
    signature: signatures.Signature, values: Mapping[str, Any], prefix: str, show: Describe, given: set[str]
) -> Iterator[tuple[str, str]]:
    parameters = signature.parameters
    own = [name for name in parameters if name not in given]
    for name, value in values.items():
        key = f"{prefix}{name}"
        parameter = parameters.get(name)
        if name in given:
            yield key, f"{show(key)}: is worked out by the program, it cannot be set{_instead(name)}"
        elif parameter is None and not signature.takes_more:
            reader = signature.name if prefix else "the program"
            yield key, f"{show(key)}: {reader} has no {name!r}{suggestion(name, own)}"
        elif parameter is not None and (fault := _fault(parameter, key, value)):
            yield key, f"{show(key)}: {fault}"
    for name, parameter in parameters.items():
        if parameter.is_required and name not in values and name not in given:
            yield f"{prefix}{name}", f"{prefix}{name}: is lacking, {signature.name} needs it; add +{prefix}{name}=VALUE"


def _fault(parameter: signatures.Parameter, key: str, value: Any) -> str | None:
    if value == "???" or (isinstance(value, Mapping) and "_target_" in value):
        return None
    if key == "predictor.num_heads" and value is None:
        return None  # those of the encoder
    if key == "name" and isinstance(value, int | float) and not isinstance(value, bool):
        return None  # name=2024 is a name
    return signatures.fault(parameter.annotation, parameter.name, value)


def _instead(name: str) -> str:
    keys = {"weight_decay": "schedule.weight_decay"} | {key: key for key in ("lr", "batch_size", "num_frames")}
    return f"; use {keys[name]}" if name in keys else ""
