"""Several runs one after the other, under the same budget: what they are, all checked first, and a process for each."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from jepa.comparison.results import BUDGET_FILE
from jepa.config import Composer, ConfigError, members, override_literal, signatures, to_dataclass
from jepa.config.catalogue import COMPARISONS
from jepa.config.schema import changed_keys
from jepa.config.values import unused_sections
from jepa.runs.metrics import read_config, read_json
from jepa.suggestions import suggestion

EXAMPLE = "as methods: {jepa: [objective=jepa], mae: [objective=mae, mask.ratio=0.75]}"


@dataclass(frozen=True)
class Recipe:
    """Methods by name, each with overrides of its own, on those that all of them have."""

    name: str = "compare"
    overrides: tuple[str, ...] = ()
    methods: Mapping[str, Sequence[str]] | None = None


@dataclass(frozen=True, kw_only=True)
class Member:
    """One run: `label` is its folder below the comparison's, `method` the label without the seed."""

    label: str
    method: str
    name: str
    """of the method in its recipe, if there is one"""
    folder: Path
    overrides: tuple[str, ...]
    config: dict[str, Any]
    dropped: tuple[str, ...]
    is_finished: bool


def read_recipe(path: Path) -> Recipe:
    """Raises ConfigError, naming the file and what it should hold."""
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError([f"{path}: cannot be read: {' '.join(str(error).split())}"]) from error
    methods = content.get("methods") if isinstance(content, dict) else None
    if not isinstance(methods, dict) or not methods:
        raise ConfigError([f"{path}: needs methods with their overrides, {EXAMPLE}"])
    lists = {"overrides": content.get("overrides", [])} | {f"methods.{name}": own for name, own in methods.items()}
    wrong = [key for key, own in lists.items() if not isinstance(own, list) or any(not isinstance(o, str) for o in own)]
    faults = [f"{path}: {key}: takes a list of overrides, {EXAMPLE}" for key in wrong]
    others = content.keys() - {"overrides", "methods"}
    faults += [f"{path}: there is no key {key!r}; it has overrides and methods" for key in others]
    odd = [name for name in methods if not re.fullmatch(r"[\w.-]+", str(name))]
    faults += [f"{path}: methods.{name}: a name has letters, digits, '_', '-' and '.'" for name in odd]
    if faults:
        raise ConfigError(faults)
    return Recipe(path.stem, tuple(lists["overrides"]), {str(name): own for name, own in methods.items()})


def find_recipe(name: str, composer: Composer) -> Recipe:
    """conf/compare/NAME.yaml, of the user's folder first."""
    found = {path.stem: path for folder in composer.folders for path in sorted(folder.glob(f"{COMPARISONS}/*.yaml"))}
    if name not in found:
        raise ConfigError([f"compare={name}: no such choice{suggestion(name, found)}; valid: {', '.join(found)}"])
    return read_recipe(found[name])


def choose_recipe(arguments: Sequence[str], file: Path | None, composer: Composer) -> tuple[Recipe, list[str]]:
    """What compare=NAME or a file asks for, and the other arguments."""
    chosen = [text.removeprefix("compare=") for text in arguments if text.startswith("compare=")]
    if len(chosen) + (file is not None) > 1:
        raise ConfigError(["give one of compare=NAME and --methods FILE"])
    recipe = read_recipe(file) if file else find_recipe(chosen[0], composer) if chosen else Recipe()
    return recipe, [text for text in arguments if not text.startswith("compare=")]


def plan(
    arguments: Sequence[str], recipe: Recipe, composer: Composer, seconds: float | None
) -> tuple[Path, list[Member]]:
    """The folder of the comparison and its runs. Raises ConfigError with the faults of all of them."""
    if seconds is not None and not seconds > 0:
        raise ConfigError([f"--seconds {seconds:g}: must be above 0"])
    parsed, faults = composer.parse(arguments)
    names = [override for override in parsed if override.key_or_group == "name"]
    faults += [f"{o.input_line}: a comparison has one name" for o in names if o.is_sweep_override()]
    faults += [f"{o.input_line}: an interval has no list of values" for o in parsed if "interval(" in str(o.input_line)]
    faults += [
        f"{o.input_line}: --seconds works out the steps of each method; leave it out"
        for o in parsed if seconds and o.key_or_group in ("steps", "epochs")
    ]  # fmt: skip
    if faults:
        raise ConfigError(faults)
    name = str(names[-1].value()) if names else recipe.name
    folder = Path("outputs") / name
    given = [text for text in arguments if text not in {o.input_line for o in names}]
    drafts = []
    for method, own in (recipe.methods or {"": ()}).items():
        texts, unread = composer.parse([*recipe.overrides, *own, *given])
        drafts += _drafts(method, texts, composer)
        faults += unread
    taken = {key for draft in drafts for key in _objective_keys(draft.config)}
    checked = [_check(draft, name, taken, composer) for draft in drafts]
    faults += [fault for _, found in checked for fault in found]
    found = list({member.label: member for member, _ in checked if member}.values())
    if len(found) == 1 and not found[0].label and not faults:
        faults.append(
            "there is only one run: give several values, as objective=jepa,mae, or folders of runs that exist"
        )
    budget = read_json(folder / BUDGET_FILE)
    if budget and budget.get("seconds") != seconds:
        faults.append(f"{folder} holds a comparison with --seconds {budget.get('seconds')}: give another name=")
    for member in found:
        faults += _other_run(member, ignore={"steps", "epochs"} if seconds else set())
    if faults:
        raise ConfigError(faults)
    return folder, found


class Candidate(NamedTuple):
    """A run before what it has no use for is left out; `config` is what its choices alone compose to."""

    method: str
    parsed: Sequence[Any]
    texts: Sequence[str]
    config: Mapping[str, Any]


def _drafts(method: str, parsed: Sequence[Any], composer: Composer) -> Iterator[Candidate]:
    """Every combination of the values given as key=a,b; of a key that is given twice the later one counts."""
    parsed = list({override.key_or_group: override for override in parsed}.values())
    configs: dict[tuple[str, ...], Mapping[str, Any]] = {}
    for texts in members(parsed):
        choices = tuple(text for o, text in zip(parsed, texts, strict=True) if composer.is_group(o))
        if choices not in configs:
            configs[choices] = composer.inspect(choices).config
        yield Candidate(method, parsed, texts, configs[choices])


def _check(draft: Candidate, name: str, taken: set[str], composer: Composer) -> tuple[Member | None, list[str]]:
    """The run and its faults; none where it has faults."""
    pairs = list(zip(draft.parsed, draft.texts, strict=True))
    kept = [(o, text) for o, text in pairs if not _is_irrelevant(o.key_or_group, draft.config, taken)]
    swept = {override.key_or_group: text for override, text in kept if override.is_sweep_override()}
    if draft.method:  # a method has a seed, so that others can come later
        given = {override.key_or_group: text for override, text in kept}
        swept.setdefault("seed", given.get("seed", f"seed={draft.config.get('seed', 0)}"))
    parts = [*([draft.method] if draft.method else []), *sorted(swept.values())]
    label = ",".join(parts)
    overrides = [*(text for _, text in kept), f"name={override_literal(f'{name}/{label}'.rstrip('/'))}"]
    config, faults = composer.inspect(overrides)
    if faults:
        return None, [f"{draft.method}: {fault}" if draft.method else fault for fault in faults]
    folder = Path("outputs") / name / label
    return Member(
        label=label,
        method=",".join(part for part in parts if not part.startswith("seed=")),
        name=draft.method,
        folder=folder,
        overrides=tuple(overrides),
        config=asdict(to_dataclass(config)),
        dropped=tuple(text for text in draft.texts if text not in overrides),
        is_finished=read_json(folder / "run.json").get("status") == "finished",
    ), []


def _is_irrelevant(key: str, config: Mapping[str, Any], taken: set[str]) -> bool:
    """Whether an override says nothing to this run: of a section its objective has no use for, or of another's."""
    return key.partition(".")[0] in unused_sections(config) or key in taken - _objective_keys(config)


def _objective_keys(config: Mapping[str, Any]) -> set[str]:
    """Keys that the chosen objective takes."""
    try:
        signature = signatures.read(config["objective"]["_target_"])
    except (LookupError, TypeError):
        return set()
    return {f"objective.{name}" for name in signature.parameters} if signature else set()


def _other_run(member: Member, ignore: set[str]) -> list[str]:
    """The fault of a member whose folder holds a run of another configuration."""
    config = read_config(member.folder)
    if not config or not (member.is_finished or (member.folder / "checkpoints" / "last").exists()):
        return []
    changed = changed_keys(config, member.config)
    told = "; ".join(text for text in changed if text.partition(":")[0] not in ignore)
    return [f"{member.folder} holds a run of another configuration ({told}): give another name="] if told else []
