"""Sweeps as Hydra's sweepers will run them: from files, from the command line, by a sampler that must be installed."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from hydra.core.override_parser.types import Override

from jepa.cli.sweep_run import Sweep
from jepa.config import Composer, members

JOBLIB, SUBMITIT = ("hydra_joblib_launcher", "sweep"), ("hydra_submitit_launcher", "slurm")
PLUGINS = {"optuna": ("hydra_optuna_sweeper", "sweep"), "joblib": JOBLIB, "local": JOBLIB}
PLUGINS |= {"slurm": SUBMITIT, "submitit_slurm": SUBMITIT, "submitit_local": SUBMITIT}
"""What is chosen of Hydra -> the package that it is in, and the extra that this comes with."""


def sweep_files(parsed: Sequence[Override]) -> list[Override]:
    """The overrides that choose a file of the group `sweep`."""
    return [override for override in parsed if override.key_or_group == "sweep" and override.value() is not None]


def with_files(composer: Composer, parsed: Sequence[Override]) -> tuple[list[Override], list[str]]:
    """What the sweepers of Hydra run: hydra.sweeper.params, then the command line, of each key the last."""
    params = composer.hydra_setting(_chosen(composer, parsed), "sweeper.params") or {}
    swept, unread = composer.parse([f"{key}={value}" for key, value in params.items()])
    return [*{override.get_key_element(): override for override in (*swept, *parsed)}.values()], unread


def _chosen(composer: Composer, parsed: Sequence[Override]) -> list[str]:
    chosen = (o for o in parsed if o.is_hydra_override() or (composer.is_group(o) and not o.is_sweep_override()))
    return [override.input_line or "" for override in chosen]


def runs_of(composer: Composer, parsed: Sequence[Override]) -> Iterator[list[str]]:
    """The overrides of every run; of a sampler, which tries few of all combinations, those of `_one_by_one`."""
    is_grid = composer.hydra_setting(_chosen(composer, parsed), "sweeper.n_trials") is None
    return members(parsed) if is_grid else _one_by_one(parsed)


def plan_sweep(composer: Composer, parsed: Sequence[Override], settings: list[str]) -> tuple[Sweep | None, list[str]]:
    """The sweep and the faults of all its members; `settings` gets what gives these their names."""
    whole, faults = with_files(composer, parsed)
    swept = {override.get_key_element() for override in whole if override.is_sweep_override()}
    plain = {override.key_or_group for override in whole if not override.is_hydra_override()} - swept
    settings.append(f"hydra.job.config.override_dirname.exclude_keys=[{','.join(sorted(plain))}]")
    keys = "sweep.dir", "launcher._target_", "sweeper.n_trials"
    place, launcher, trials = (composer.hydra_setting(_chosen(composer, parsed), key) for key in keys)
    folders, found, config = [], [], {}
    for member in runs_of(composer, whole):
        label = ",".join(sorted(text for text in member if text.partition("=")[0] in swept))
        config, wrong = composer.inspect(member, sweep_folder=label)
        faults += wrong
        folders.append(Path(str(place).replace("${name}", str(config.get("name")))))
        found.append(folders[-1] / label)
    if "${" in str(folders[0]) or config.get("estimate"):  # of a value known to Hydra alone; nothing trained
        return None, faults
    return Sweep(tuple(dict.fromkeys(folders)), found if trials is None else [], str(launcher)), faults


def _one_by_one(parsed: Sequence[Override]) -> Iterator[list[str]]:
    """The first values of all, then each other value in turn."""
    axes = [[text for (text,) in members([override])] for override in parsed]
    first = [axis[0] for axis in axes]
    yield first
    for place, axis in enumerate(axes):
        yield from ([*first[:place], text, *first[place + 1 :]] for text in axis[1:])


def lacking_plugins(composer: Composer, parsed: Sequence[Override]) -> Iterator[str]:
    """What is chosen of Hydra, here or by a file of a sweep, and is not installed."""
    files = composer.catalogue.groups.get("sweep", {})
    for override in parsed:
        name, wanted = override.get_value_string(), []
        if override.key_or_group in ("hydra/sweeper", "hydra/launcher"):
            wanted = [name]
        elif override in sweep_files(parsed) and name in files:
            wanted = re.findall(r"override /hydra/(?:sweeper|launcher): (\w+)", files[name].text)
        elif override in sweep_files(parsed) and override.is_sweep_override():
            yield f"{override.input_line}: one file of a sweep at a time"
        for plugin in wanted:
            package, extra = PLUGINS.get(plugin, ("", ""))
            if package and find_spec(f"hydra_plugins.{package}") is None:
                yield f"{override.input_line}: {plugin} is not installed: pip install 'jepa-train[{extra}]'"
            elif plugin == "slurm" and not shutil.which("sbatch"):
                yield f"{override.input_line}: there is no sbatch here; on a machine without Slurm take local"
