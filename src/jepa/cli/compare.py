"""jepa-compare: trains several methods under one budget, or collects existing runs, and writes one table."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jepa.cli.answers import add_flags, answer
from jepa.cli.terminal import STOPPED, quick_imports, run_command
from jepa.config.machine import check_writable
from jepa.errors import ConfigError, RunError

if TYPE_CHECKING:
    from jepa.comparison.results import RunResult

EPILOG = """\
examples
  jepa-compare experiment=quickstart objective=jepa,mae,vae,autoencoder seed=0,1,2 name=shapes
                                every combination, one after the other; run it again to resume
  jepa-compare compare=shapes seed=0,1,2      the methods of conf/compare/shapes.yaml, each with its settings
  jepa-compare compare=shapes --seconds 60    equal training time instead of equal samples
  jepa-compare outputs/shapes   a table of existing runs, also those of jepa-train --multirun

Writes compare.md, .html and .json into outputs/NAME, or into FOLDER if only that is given."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 if a run failed, 2 for an error in the arguments, 128 plus the signal that stopped it."""
    parser = ArgumentParser("jepa-compare", None, __doc__, EPILOG, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", metavar="KEY=VALUE | FOLDER", help="as for jepa-train, or folders of runs")
    parser.add_argument("--methods", type=Path, metavar="FILE", help="a file of methods, like those in conf/compare")
    parser.add_argument("--seconds", type=float, metavar="N", help="train each run for N seconds")
    parser.add_argument("--wandb", action="store_true", help="also send table and curves to Weights & Biases")
    add_flags(parser)
    given = list(sys.argv[1:] if arguments is None else arguments)

    def command() -> int:
        status = answer("jepa-compare", "train", given, _configs)
        if status is not None:
            return status
        flags = parser.parse_intermixed_args(given)
        folders = [Path(text) for text in flags.what if "=" not in text or os.path.isdir(text)]
        return _collect(flags, folders) if folders else _run(flags)

    return run_command("jepa-compare", command, failed=2)


def _configs(overrides: Sequence[str], config_dir: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """The configurations of the runs that a comparison would train."""
    from jepa.comparison.plan import choose_recipe, plan
    from jepa.config import Composer

    composer = Composer(config_dir)
    composer.needs_data = False
    recipe, overrides = choose_recipe([text for text in overrides if "=" in text], None, composer)
    yield from ((member.label, member.config) for member in plan(overrides, recipe, composer, None)[1])


def _collect(flags: Namespace, folders: Sequence[Path]) -> int:
    from jepa.comparison.results import find_runs

    overrides = [text for text in flags.what if Path(text) not in folders]
    if invalid := [text for text in overrides if not text.startswith("name=")]:
        raise RunError(f"{invalid[0]}: folders of existing runs take no overrides except name=NAME")
    if len(folders) == 1 and not overrides:
        runs = find_runs(folders)
        return _report(flags, folders[0], folders[0].resolve().name, runs, {})
    name = overrides[-1].removeprefix("name=") if overrides else "compare"
    return _report(flags, Path("outputs") / name, name, find_runs(folders), {})


def _run(flags: Namespace) -> int:
    from jepa.comparison.plan import choose_recipe, plan
    from jepa.comparison.results import find_runs
    from jepa.comparison.runs import TrainProcesses, run_all
    from jepa.config import Composer, to_dataclass
    from jepa.parallel.signals import STOPS, handlers

    composer = Composer(flags.config_dir)
    recipe, overrides = choose_recipe(flags.what, flags.methods, composer)
    folder, members = plan(overrides, recipe, composer, flags.seconds)
    if any(member.config["estimate"] for member in members):
        with quick_imports():
            from jepa.resources.estimate import print_estimates
        return print_estimates({member.label: to_dataclass(member.config) for member in members})
    if [member.label for member in members] == [""]:
        only = "there is only one run: give several values, as objective=jepa,mae, or folders of runs that exist"
        raise ConfigError([only])
    check_writable(folder)
    processes = TrainProcesses(["--config-dir", flags.config_dir] if flags.config_dir else [])
    with handlers(STOPS, processes.receive):
        failed = run_all(folder, members, flags.seconds, processes)
    if processes.signum:
        print(f"jepa-compare: {STOPPED}", file=sys.stderr)
        return 128 + processes.signum
    if len(failed) == len(members):
        print("jepa-compare: all runs failed, there is nothing to compare", file=sys.stderr)
        return 1
    runs = [run for run in find_runs([folder]) if run.folder != folder]
    return _report(flags, folder, folder.name, runs, failed)


def _report(flags: Namespace, target: Path, name: str, runs: Sequence[RunResult], failed: dict[str, str]) -> int:
    """Write and print the comparison; returns 1 if a run failed."""
    from jepa.comparison.report import send_to_wandb, write
    from jepa.comparison.results import compare

    folders = {str(run.folder) for run in runs}
    comparison = compare(runs, [(folder, reason) for folder, reason in failed.items() if folder not in folders])
    print(f"\n{write(comparison, target, name)}\nreport: {target / 'compare.html'}")
    if flags.wandb:
        send_to_wandb(comparison, target, name)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
