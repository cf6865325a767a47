"""The runs of a comparison: every combination of methods and values, all checked before the first one starts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from jepa.comparison.results import read_budget
from jepa.config import (
    Composer,
    ConfigError,
    as_config_errors,
    members,
    name_as_text,
    override_literal,
    signatures,
    to_dataclass,
)
from jepa.config.catalogue import COMPARISONS
from jepa.config.checkpoints import newest
from jepa.config.files import read_yaml
from jepa.config.schema import changed_keys
from jepa.config.values import unused_sections
from jepa.runs.metrics import read_config, read_ending
from jepa.suggestions import suggestion

EXAMPLE = "as methods: {jepa: [objective=jepa], mae: [objective=mae, mask.ratio=0.75]}"


@dataclass(frozen=True)
class Recipe:
    """The methods of a comparison by name, each with its overrides, and the overrides that they share."""

    name: str = "compare"
    overrides: Sequence[str] = ()
    methods: Mapping[str, Sequence[str]] = field(default_factory=lambda: {"": ()})


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """A run: `label` is its folder below that of the comparison, `method` the label without the seed."""

    label: str
    method: str
    name: str
    """name of the method in the recipe; empty without a recipe"""
    folder: Path
    overrides: tuple[str, ...]
    config: dict[str, Any]
    dropped: tuple[str, ...]
    """overrides that do not apply to this run"""
    is_finished: bool


def read_recipe(path: Path) -> Recipe:
    """Read a YAML file with methods and overrides. Raises ConfigError, naming the file and what it should hold."""
    with as_config_errors():
        content = read_yaml(path, aliases=True)
    methods = content.get("methods")
    if not isinstance(methods, dict) or not methods:
        raise ConfigError([f"{path}: needs methods with their overrides, {EXAMPLE}"])
    lists = {"overrides": content.get("overrides", [])} | {f"methods.{name}": texts for name, texts in methods.items()}
    errors = [
        f"{path}: {key}: takes a list of overrides, {EXAMPLE}" for key, texts in lists.items()
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts)
    ]  # fmt: skip
    unknown = content.keys() - {"overrides", "methods"}
    errors += [f"{path}: there is no key {key!r}; it has overrides and methods" for key in unknown]
    invalid = [name for name in methods if not re.fullmatch(r"[\w.-]+", str(name))]
    errors += [f"{path}: methods.{name}: a name has letters, digits, '_', '-' and '.'" for name in invalid]
    if errors:
        raise ConfigError(errors)
    return Recipe(path.stem, lists["overrides"], {str(name): texts for name, texts in methods.items()})


def find_recipe(name: str, composer: Composer) -> Recipe:
    """The recipe conf/compare/NAME.yaml; the user's folder comes first."""
    paths = {path.stem: path for folder in composer.folders for path in sorted(folder.glob(f"{COMPARISONS}/*.yaml"))}
    if name not in paths:
        raise ConfigError([f"compare={name}: no such choice{suggestion(name, paths)}; valid: {', '.join(paths)}"])
    return read_recipe(paths[name])


def choose_recipe(arguments: Sequence[str], file: Path | None, composer: Composer) -> tuple[Recipe, list[str]]:
    """The recipe of compare=NAME or of a file, and the other arguments."""
    names = [text.removeprefix("compare=") for text in arguments if text.startswith("compare=")]
    if len(names) + (file is not None) > 1:
        raise ConfigError(["give one of compare=NAME and --methods FILE"])
    recipe = read_recipe(file) if file else find_recipe(names[0], composer) if names else Recipe()
    return recipe, [text for text in arguments if not text.startswith("compare=")]


def plan(
    arguments: Sequence[str], recipe: Recipe, composer: Composer, seconds: float | None
) -> tuple[Path, list[PlannedRun]]:
    """The folder of the comparison and its runs. Raises ConfigError with the errors of all runs."""
    if seconds is not None and not seconds > 0:
        raise ConfigError([f"--seconds {seconds:g}: must be above 0"])
    arguments = list(map(name_as_text, arguments))
    parsed, errors = composer.parse(arguments)
    names = [override for override in parsed if override.key_or_group == "name"]
    errors += [f"{o.input_line}: a comparison has one name" for o in names if o.is_sweep_override()]
    errors += [f"{o.input_line}: an interval has no list of values" for o in parsed if "interval(" in str(o.input_line)]
    errors += [
        f"{o.input_line}: --seconds works out the steps of each method; leave it out"
        for o in parsed if seconds and o.key_or_group in ("steps", "epochs")
    ]  # fmt: skip
    if errors:
        raise ConfigError(errors)
    name = str(names[-1].value()) if names else recipe.name
    folder = Path("outputs") / name
    shared = [text for text in arguments if text not in {o.input_line for o in names}]
    candidates = []
    for method, overrides in recipe.methods.items():
        parsed, parse_errors = composer.parse([*recipe.overrides, *overrides, *shared])
        candidates += _candidates(method, parsed, composer)
        errors += parse_errors
    all_keys = {key for candidate in candidates for key in _objective_keys(candidate.config)}
    runs: dict[str, PlannedRun] = {}
    for candidate in candidates:
        try:
            member = _check(candidate, name, all_keys, composer)
            runs[member.label] = member
        except ConfigError as error:
            errors += [f"{candidate.method}: {text}" if candidate.method else text for text in error.errors]
    budget = read_budget(folder) if composer.needs_data else {}
    if budget and budget.get("seconds") != seconds:
        errors.append(f"{folder} holds a comparison with --seconds {budget.get('seconds')}: give another name=")
    for member in runs.values() if composer.needs_data else ():
        errors += _check_folder(member, ignore={"steps", "epochs"} if seconds else set())
    if errors:
        raise ConfigError(errors)
    return folder, list(runs.values())


class Candidate(NamedTuple):
    """A run before inapplicable overrides are dropped."""

    method: str
    overrides: Sequence[tuple[Any, str]]
    """parsed overrides, each with its text for this run"""
    config: Mapping[str, Any]
    """configuration of its choices alone"""


def _candidates(method: str, parsed: Sequence[Any], composer: Composer) -> Iterator[Candidate]:
    """Every combination of the values given as key=a,b; the last override of a key counts."""
    parsed = list({override.key_or_group: override for override in parsed}.values())
    configs: dict[tuple[str, ...], Mapping[str, Any]] = {}
    for texts in members(parsed):
        overrides = list(zip(parsed, texts, strict=True))
        choices = tuple(text for override, text in overrides if composer.is_group(override))
        if choices not in configs:
            configs[choices] = composer.check(choices).config
        yield Candidate(method, overrides, configs[choices])


def _check(candidate: Candidate, comparison: str, all_keys: set[str], composer: Composer) -> PlannedRun:
    """The run of a candidate. Raises ConfigError; `all_keys` are the objective keys of all candidates."""
    method, config = candidate.method, candidate.config
    ignored = all_keys - _objective_keys(config)
    unused = unused_sections(config)
    applicable = {
        o.key_or_group: (o, text) for o, text in candidate.overrides
        if o.key_or_group not in ignored and o.key_or_group.partition(".")[0] not in unused
    }  # fmt: skip
    varied = {key: text for key, (override, text) in applicable.items() if override.is_sweep_override()}
    texts = [text for _, text in applicable.values()]
    if method:  # the label always has the seed, so that other seeds can be added later
        seed = applicable["seed"][1] if "seed" in applicable else f"seed={config.get('seed', 0)}"
        varied.setdefault("seed", seed)
    parts = [*filter(None, [method]), *sorted(varied.values())]
    label = ",".join(parts)
    overrides = [*texts, f"name={override_literal(f'{comparison}/{label}'.rstrip('/'))}"]
    complete, errors = composer.check(overrides)
    if errors := [error for error in errors if composer.needs_data or not error.endswith("=VALUE")]:
        raise ConfigError(errors)
    folder = Path("outputs") / comparison / label
    return PlannedRun(
        label=label, method=",".join(part for part in parts if not part.startswith("seed=")), name=method,
        folder=folder, overrides=tuple(overrides),
        config=asdict(to_dataclass(complete)) if composer.needs_data else complete,  # shown with missing values, too
        dropped=tuple(text for _, text in candidate.overrides if text not in overrides),
        is_finished=read_ending(folder).get("status") == "finished",
    )  # fmt: skip


def _objective_keys(config: Mapping[str, Any]) -> set[str]:
    """Dotted keys of the objective's arguments."""
    signature = signatures.read_if_known((config.get("objective") or {}).get("_target_"))
    return {f"objective.{name}" for name in signature.parameters} if signature else set()


def _check_folder(member: PlannedRun, ignore: set[str]) -> list[str]:
    """An error if the folder of the member holds a run of another configuration."""
    config = read_config(member.folder)
    if not config or not (member.is_finished or newest(member.folder)):
        return []
    changes = [text for text in changed_keys(config, member.config) if text.partition(":")[0] not in ignore]
    if not changes or member.config["estimate"]:
        return []
    return [f"{member.folder} holds a run of another configuration ({'; '.join(changes)}): give another name="]
