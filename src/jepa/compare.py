"""Several runs one after the other, under the same budget: what they are, all checked first, and a process for each."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import yaml

from jepa import signatures
from jepa.catalogue import COMPARISONS, suggestion
from jepa.compare_results import BUDGET, MEASURING
from jepa.config import Composer, ConfigError, literal, members, typed
from jepa.config_checks import unused
from jepa.folder_log import read_json, read_rows, write_atomically
from jepa.schema import changed_keys
from jepa.verdict import series

WARM_UP, MEASURED = 4, 12
"""steps of the measurement; the first ones are left out of the rate"""
TAIL = 15
"""lines of a failed run that are shown again"""


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
    budget = read_json(folder / BUDGET)
    if budget and budget.get("seconds") != seconds:
        faults.append(f"{folder} holds a comparison with --seconds {budget.get('seconds')}: give another name=")
    for member in found:
        faults += _other_run(member, ignore={"steps", "epochs"} if seconds else set())
    if faults:
        raise ConfigError(faults)
    return folder, found


class Draft(NamedTuple):
    """A run before what it has no use for is left out; `config` is what its choices alone compose to."""

    method: str
    parsed: Sequence[Any]
    texts: Sequence[str]
    config: Mapping[str, Any]


def _drafts(method: str, parsed: Sequence[Any], composer: Composer) -> Iterator[Draft]:
    """Every combination of the values given as key=a,b; of a key that is given twice the later one counts."""
    parsed = list({override.key_or_group: override for override in parsed}.values())
    configs: dict[tuple[str, ...], Mapping[str, Any]] = {}
    for texts in members(parsed):
        choices = tuple(text for o, text in zip(parsed, texts, strict=True) if composer.is_group(o))
        if choices not in configs:
            configs[choices] = composer.inspect(choices).config
        yield Draft(method, parsed, texts, configs[choices])


def _check(draft: Draft, name: str, taken: set[str], composer: Composer) -> tuple[Member | None, list[str]]:
    """The run and its faults; none where it has faults."""
    pairs = list(zip(draft.parsed, draft.texts, strict=True))
    kept = [(o, text) for o, text in pairs if not _is_useless(o.key_or_group, draft.config, taken)]
    swept = {override.key_or_group: text for override, text in kept if override.is_sweep_override()}
    if draft.method:  # a method has a seed, so that others can come later
        given = {override.key_or_group: text for override, text in kept}
        swept.setdefault("seed", given.get("seed", f"seed={draft.config.get('seed', 0)}"))
    parts = [*([draft.method] if draft.method else []), *sorted(swept.values())]
    label = ",".join(parts)
    overrides = [*(text for _, text in kept), f"name={literal(f'{name}/{label}'.rstrip('/'))}"]
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
        config=asdict(typed(config)),
        dropped=tuple(text for text in draft.texts if text not in overrides),
        is_finished=read_json(folder / "run.json").get("status") == "finished",
    ), []


def _is_useless(key: str, config: Mapping[str, Any], taken: set[str]) -> bool:
    """Whether an override says nothing to this run: of a section its objective has no use for, or of another's."""
    return key.partition(".")[0] in unused(config) or key in taken - _objective_keys(config)


def _objective_keys(config: Mapping[str, Any]) -> set[str]:
    """Keys that the chosen objective takes."""
    try:
        signature = signatures.read(config["objective"]["_target_"])
    except (LookupError, TypeError):
        return set()
    return {f"objective.{name}" for name in signature.parameters} if signature else set()


def _other_run(member: Member, ignore: set[str]) -> list[str]:
    """The fault of a member whose folder holds a run of another configuration."""
    path = member.folder / "config.yaml"
    if not path.exists() or not (member.is_finished or (member.folder / "checkpoints" / "last").exists()):
        return []
    changed = changed_keys(yaml.safe_load(path.read_text()), member.config)
    told = "; ".join(text for text in changed if text.partition(":")[0] not in ignore)
    return [f"{member.folder} holds a run of another configuration ({told}): give another name="] if told else []


def _with_steps(member: Member, steps: int) -> Member:
    overrides = [text for text in member.overrides if not text.startswith("steps=")]
    return replace(member, overrides=(*overrides, f"steps={steps}"), config=member.config | {"steps": steps})


class Children:
    """Runs of jepa-train in processes of their own, to which a signal is handed on."""

    def __init__(self, flags: Sequence[str] = ()) -> None:
        self.flags = tuple(flags)
        self.signum = 0
        self._child: subprocess.Popen | None = None

    def say(self, text: str) -> None:
        print(text, flush=True)

    def receive(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(signum)

    def train(self, overrides: Sequence[str], *, quiet: bool = False) -> tuple[int, list[str]]:
        """Exit status and last lines; what it prints is said line by line."""
        command = [sys.executable, "-m", "jepa.cli.train", *self.flags, *overrides]
        tail: deque[str] = deque(maxlen=TAIL)
        # a group of its own, or Ctrl-C would reach it twice: a second one stops it without saving
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", process_group=0
        ) as self._child:
            if self.signum:
                self._child.send_signal(self.signum)
            assert self._child.stdout is not None
            for line in map(str.rstrip, self._child.stdout):
                tail.append(line)
                if not quiet:
                    self.say(line)
        return self._child.returncode, list(tail)


@contextmanager
def children(flags: Sequence[str] = ()) -> Iterator[Children]:
    """SIGINT and SIGTERM go to the run in hand while the block runs; the earlier handlers come back after it."""
    family = Children(flags)
    earlier = {s: signal.signal(s, family.receive) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield family
    finally:
        for signum, handler in earlier.items():
            signal.signal(signum, handler)


def run_all(folder: Path, found: Sequence[Member], seconds: float | None, family: Children) -> dict[str, str]:
    """Train what is not finished; the labels of runs that failed, each with its reason. A signal ends it early."""
    budget = {"seconds": seconds, "steps": {}, "samples_per_s": {}, "members": {}} | read_json(folder / BUDGET)
    budget["members"] |= {member.label: member.method * bool(member.name) for member in found}
    failed = {}
    for number, member in enumerate(found, start=1):
        if family.signum:
            break
        family.say(f"== {number}/{len(found)} {member.label}{' is finished' * member.is_finished} ==")
        if member.dropped and not member.is_finished:
            family.say(f"its objective has no use for {', '.join(member.dropped)}: left out")
        if member.is_finished:
            continue
        status, tail = _run(folder, member, budget, family)
        if status and not family.signum:
            failed[str(member.folder)] = f"exit status {status}"
            told = "".join(f"\n  | {line}" for line in tail)
            family.say(f"{member.label} failed with exit status {status}; its last lines:{told}")
    return failed


def _run(folder: Path, member: Member, budget: dict[str, Any], family: Children) -> tuple[int, list[str]]:
    if budget["seconds"] is not None and member.method not in budget["steps"]:
        status, tail = _measure(folder, member, budget, family)
        if status:
            return status, tail
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / BUDGET, json.dumps(budget, indent=1))
    if budget["seconds"] is not None:
        member = _with_steps(member, budget["steps"][member.method])
    return family.train(member.overrides)


def _measure(folder: Path, member: Member, budget: dict[str, Any], family: Children) -> tuple[int, list[str]]:
    """Some steps of a run that is thrown away: how many of them, loader and optimizer included, fill the budget."""
    place = folder / MEASURING
    size = member.config["batch_size"]
    shutil.rmtree(place, ignore_errors=True)
    quick = [f"steps={WARM_UP + MEASURED}", f"log_every={WARM_UP}", "evaluator=[]", "logger=none", "phases=[]"]
    small = ["evaluation.train_samples=2", "evaluation.val_samples=2", "evaluation.still=false"]
    wanted = {text.partition("=")[0] for text in [*quick, *small, "epochs=", "name="]}
    kept = [text for text in member.overrides if text.lstrip("+").partition("=")[0] not in wanted]
    name = literal(place.relative_to("outputs"))
    status, tail = family.train([*kept, *quick, *small, f"name={name}"], quiet=True)
    rates = [rate for step, rate in series(read_rows(place), "perf/samples_per_s") if step > WARM_UP]
    shutil.rmtree(place, ignore_errors=True)
    if status or not rates:
        return status or 1, tail
    rate = len(rates) / sum(1 / rate for rate in rates)
    steps = max(1, round(budget["seconds"] * rate / size))
    budget["steps"][member.method], budget["samples_per_s"][member.method] = steps, rate
    family.say(f"{member.method}: {rate:.1f} samples/s here, so {steps:,} steps of {size} fill {budget['seconds']:g} s")
    return 0, []
