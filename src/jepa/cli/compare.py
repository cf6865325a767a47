"""jepa-compare: runs several methods under one budget, or collects runs that exist, into one table."""

from __future__ import annotations

import argparse
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path

from jepa.schema import ConfigError
from jepa.types import RunError

EPILOG = """\
examples
  jepa-compare experiment=quickstart objective=jepa,mae,vae,autoencoder seed=0,1,2 name=shapes
                                   every combination, one after the other; again: goes on where it was left
  jepa-compare compare=shapes seed=0,1,2
                                   the methods of conf/compare/shapes.yaml, each with settings of its own
  jepa-compare compare=shapes --seconds 60
                                   as much training time for each instead of as many samples
  jepa-compare outputs/shapes      the table of runs that exist, also of a sweep of jepa-train --multirun

The result: compare.md, compare.html and compare.json in outputs/NAME (of folders, in the folder)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0, 1 where a run failed, 2 for what is refused, 128 plus the signal that stopped it."""
    parser = argparse.ArgumentParser(
        "jepa-compare", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "what", nargs="*", metavar="KEY=VALUE | FOLDER", help="overrides as of jepa-train, or folders of runs"
    )
    parser.add_argument("--methods", type=Path, metavar="FILE", help="a file as those of compare=NAME, anywhere")
    parser.add_argument(
        "--seconds", type=float, metavar="N", help="train each run for N seconds, instead of equally many samples"
    )
    parser.add_argument("--wandb", action="store_true", help="also send table and curves to Weights & Biases")
    parser.add_argument("--config-dir", metavar="FOLDER", help="a folder with groups of your own")
    flags = parser.parse_intermixed_args(arguments)
    try:
        return _collect(flags) if _names_folders(flags.what) else _run(flags)
    except (ConfigError, RunError) as error:
        print(f"jepa-compare: {error}", file=sys.stderr)
        return 2


def _names_folders(what: Sequence[str]) -> bool:
    return any(("=" not in text or Path(text).is_dir()) and not text.startswith("~") for text in what)


def _collect(flags: argparse.Namespace) -> int:
    from jepa.compare_results import find_runs

    names = [text.removeprefix("name=") for text in flags.what if text.startswith("name=") and not Path(text).is_dir()]
    folders = [Path(text) for text in flags.what if f"name={text.removeprefix('name=')}" != text or Path(text).is_dir()]
    if mixed := [str(folder) for folder in folders if "=" in str(folder) and not folder.is_dir()]:
        raise RunError(f"{mixed[0]}: folders of runs that exist take no overrides but name=NAME")
    name = names[-1] if names else folders[0].resolve().name if len(folders) == 1 else "compare"
    place = folders[0] if len(folders) == 1 and not names else Path("outputs") / name
    return _tell(flags, place, name, find_runs(folders), {})


def _run(flags: argparse.Namespace) -> int:
    from jepa.compare import Recipe, children, find_recipe, plan, read_recipe, run_all
    from jepa.compare_results import find_runs
    from jepa.config import Composer

    if flags.seconds is not None and not flags.seconds > 0:
        raise ConfigError([f"--seconds {flags.seconds:g}: must be above 0"])
    chosen = [text.removeprefix("compare=") for text in flags.what if text.startswith("compare=")]
    if (flags.methods and chosen) or len(chosen) > 1:
        raise ConfigError(["give one of compare=NAME and --methods FILE"])
    composer = Composer(flags.config_dir)
    recipe = read_recipe(flags.methods) if flags.methods else find_recipe(chosen[0], composer) if chosen else Recipe()
    overrides = [text for text in flags.what if not text.startswith("compare=")]
    folder, members = plan(overrides, recipe, composer, flags.seconds)
    given = ["--config-dir", flags.config_dir] if flags.config_dir else []
    with children(lambda line: print(line, flush=True), given) as family:
        failed = run_all(folder, members, flags.seconds, family)
    if family.signum:
        print("jepa-compare: stopped; the same command again goes on from there", file=sys.stderr)
        return 128 + family.signum
    own = folder.resolve()
    runs = (
        [run for run in find_runs([folder]) if run.folder.resolve() != own] if any(folder.rglob("config.yaml")) else []
    )
    return _tell(flags, folder, folder.name, runs, failed) or min(1, len(failed))


def _tell(flags: argparse.Namespace, place: Path, name: str, runs: Sequence, failed: dict[str, str]) -> int:
    from jepa.compare_report import write
    from jepa.compare_results import compare

    known = {str(run.folder) for run in runs}
    comparison = compare(runs, [pair for pair in failed.items() if pair[0] not in known])
    print(f"\n{write(comparison, place, name)}\nreport: {place / 'compare.html'}")
    if flags.wandb:
        from jepa.compare_report import send_to_wandb

        send_to_wandb(comparison, place, name, secrets.token_hex(4))
    return 0
