"""jepa-compare: runs several methods under one budget, or collects runs that exist, into one table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from jepa.cli.terminal import outcome
from jepa.errors import RunError

EPILOG = """\
examples
  jepa-compare experiment=quickstart objective=jepa,mae,vae,autoencoder seed=0,1,2 name=shapes
                                every combination, one after the other; the same command again goes on
  jepa-compare compare=shapes seed=0,1,2
                                the methods of conf/compare/shapes.yaml, each with settings of its own
  jepa-compare compare=shapes --seconds 60    equal training time instead of as many samples
  jepa-compare outputs/shapes   the table of runs that exist, also of a sweep of jepa-train --multirun

The result is compare.md, .html and .json in outputs/NAME; of one folder, in that folder."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0, 1 where a run failed, 2 for what is refused, 128 plus the signal that stopped it."""
    parser = argparse.ArgumentParser(
        "jepa-compare", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="*", metavar="KEY=VALUE | FOLDER", help="as for jepa-train, or folders of runs")
    parser.add_argument("--methods", type=Path, metavar="FILE", help="a file like that of compare=NAME, anywhere")
    parser.add_argument("--seconds", type=float, metavar="N", help="train each run for N seconds")
    parser.add_argument("--wandb", action="store_true", help="also send table and curves to Weights & Biases")
    parser.add_argument("--config-dir", metavar="FOLDER", help="a folder with groups of your own")
    flags = parser.parse_intermixed_args(arguments)
    folders = [Path(text) for text in flags.what if "=" not in text or Path(text).is_dir()]
    return outcome("jepa-compare", lambda: _collect(flags, folders) if folders else _run(flags), failed=2)


def _collect(flags: argparse.Namespace, folders: Sequence[Path]) -> int:
    from jepa.comparison.results import find_runs

    others = [text for text in flags.what if Path(text) not in folders]
    if wrong := [text for text in others if not text.startswith("name=")]:
        raise RunError(f"{wrong[0]}: folders of runs that exist take no overrides but name=NAME")
    name = others[-1].removeprefix("name=") if others else folders[0].resolve().name if len(folders) == 1 else "compare"
    place = folders[0] if len(folders) == 1 and not others else Path("outputs") / name
    return _tell(flags, place, name, find_runs(folders), {})


def _run(flags: argparse.Namespace) -> int:
    from jepa.comparison.plan import choose_recipe, plan
    from jepa.comparison.results import find_runs
    from jepa.comparison.runs import TrainProcesses, run_all
    from jepa.config import Composer
    from jepa.parallel.signals import STOPS, handlers

    composer = Composer(flags.config_dir)
    recipe, overrides = choose_recipe(flags.what, flags.methods, composer)
    folder, members = plan(overrides, recipe, composer, flags.seconds)
    processes = TrainProcesses(["--config-dir", flags.config_dir] if flags.config_dir else [])
    with handlers(STOPS, processes.receive):
        failed = run_all(folder, members, flags.seconds, processes)
    if processes.signum:
        print("jepa-compare: stopped; the same command again goes on from there", file=sys.stderr)
        return 128 + processes.signum
    if len(failed) == len(members):
        print("jepa-compare: every run has failed, nothing to compare", file=sys.stderr)
        return 1
    runs = find_runs([folder])
    return _tell(flags, folder, folder.name, [run for run in runs if run.folder != folder], failed) or min(
        1, len(failed)
    )


def _tell(flags: argparse.Namespace, place: Path, name: str, runs: Sequence, failed: dict[str, str]) -> int:
    from jepa.comparison.report import send_to_wandb, write
    from jepa.comparison.results import compare

    known = {str(run.folder) for run in runs}
    comparison = compare(runs, [pair for pair in failed.items() if pair[0] not in known])
    print(f"\n{write(comparison, place, name)}\nreport: {place / 'compare.html'}")
    if flags.wandb:
        send_to_wandb(comparison, place, name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
