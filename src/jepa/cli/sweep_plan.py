"""The members of a sweep as Hydra's sweepers will run them, and the plugins that it needs."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from hydra.core.override_parser.types import Override

from jepa.cli.sweep_run import Sweep
from jepa.config import Composer, members
from jepa.config.rules import folder_name_errors

JOBLIB, SUBMITIT = ("hydra_joblib_launcher", "sweep"), ("hydra_submitit_launcher", "slurm")
PLUGINS = {"optuna": ("hydra_optuna_sweeper", "sweep"), "joblib": JOBLIB, "local": JOBLIB}
PLUGINS |= {"slurm": SUBMITIT, "submitit_slurm": SUBMITIT, "submitit_local": SUBMITIT}
"""Sweeper or launcher -> (package of its Hydra plugin, extra of jepa-train that installs it)."""


def with_sweep_files(composer: Composer, parsed: Sequence[Override]) -> tuple[list[Override], list[str]]:
    """Overrides of hydra.sweeper.params, replaced by those of the command line with the same key, and syntax errors."""
    params = composer.hydra_setting(_choices(composer, parsed), "sweeper.params") or {}
    swept, errors = composer.parse([f"{key}={value}" for key, value in params.items()])
    return [*{override.get_key_element(): override for override in (*swept, *parsed)}.values()], errors


def _choices(composer: Composer, parsed: Sequence[Override]) -> list[str]:
    """The overrides that hydra.* settings depend on: those of Hydra itself and of groups."""
    choices = (o for o in parsed if o.is_hydra_override() or (composer.is_group(o) and not o.is_sweep_override()))
    return [override.input_line or "" for override in choices]


def member_overrides(composer: Composer, parsed: Sequence[Override]) -> Iterator[list[str]]:
    """The overrides of every member; for a sampler, which tries only some combinations, those of `_one_by_one`."""
    is_grid = composer.hydra_setting(_choices(composer, parsed), "sweeper.n_trials") is None
    return members(parsed) if is_grid else _one_by_one(parsed)


def plan_sweep(composer: Composer, parsed: Sequence[Override], settings: list[str]) -> tuple[Sweep | None, list[str]]:
    """The sweep and the errors of all its members; appends to `settings` the one that names the members' folders."""
    overrides, errors = with_sweep_files(composer, parsed)
    swept = {override.get_key_element() for override in overrides if override.is_sweep_override()}
    fixed = {override.key_or_group for override in overrides if not override.is_hydra_override()} - swept
    settings.append(f"hydra.job.config.override_dirname.exclude_keys=[{','.join(sorted(fixed))}]")
    settings.append("hydra.hydra_logging.root.level=WARNING")  # of Hydra, which prints all overrides of each member
    keys = "sweep.dir", "launcher._target_", "sweeper.n_trials"
    sweep_dir, launcher, trials = (composer.hydra_setting(_choices(composer, parsed), key) for key in keys)
    folders, member_folders, config = [], [], {}
    for member in member_overrides(composer, overrides):
        label = ",".join(sorted(text for text in member if text.partition("=")[0] in swept))
        config, member_errors = composer.check(member, sweep_folder=label)
        errors += member_errors
        errors += folder_name_errors(label)
        folders.append(Path(str(sweep_dir).replace("${name}", str(config.get("name")))))
        member_folders.append(folders[-1] / label)
    if "${" in str(folders[0]) or config.get("estimate"):  # only Hydra can resolve the folder, or nothing is trained
        return None, errors
    return Sweep(tuple(dict.fromkeys(folders)), member_folders if trials is None else [], str(launcher)), errors


def _one_by_one(parsed: Sequence[Override]) -> Iterator[list[str]]:
    """The first value of every key, then each other value with the first values of the other keys."""
    axes = [[text for (text,) in members([override])] for override in parsed]
    yield (first := [axis[0] for axis in axes])
    for position, axis in enumerate(axes):
        yield from ([*first[:position], text, *first[position + 1 :]] for text in axis[1:])


def missing_plugins(composer: Composer, parsed: Sequence[Override]) -> Iterator[str]:
    """Errors for sweepers and launchers that the command line or a sweep file selects and that are not installed."""
    files = composer.catalogue.groups.get("sweep", {})
    for override in parsed:
        if override.is_delete():
            continue
        name, plugins = override.get_value_string(), []
        if override.key_or_group in ("hydra/sweeper", "hydra/launcher"):
            plugins = [name]
        elif override.key_or_group == "sweep" and name in files:
            plugins = re.findall(r"override /hydra/(?:sweeper|launcher): (\w+)", files[name].text)
        elif override.key_or_group == "sweep" and override.is_sweep_override():
            yield f"{override.input_line}: only one sweep file can be selected"
        for plugin in plugins:
            package, extra = PLUGINS.get(plugin, ("", ""))
            if package and not _is_installed(package):
                yield f"{override.input_line}: {plugin} is not installed: pip install 'jepa-train[{extra}]'"
            elif plugin == "slurm" and not shutil.which("sbatch"):
                yield f"{override.input_line}: there is no sbatch here; without Slurm use hydra/launcher=local"


def _is_installed(package: str) -> bool:
    with suppress(ModuleNotFoundError):  # without any plugin there is no hydra_plugins either
        return find_spec(f"hydra_plugins.{package}") is not None
    return False
