"""What every command answers without doing its work: its version, completion for the shell, its configuration."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import yaml

from jepa.errors import ConfigError

FLAGS = """\
  --config-dir FOLDER     a folder with your own configuration groups, as FOLDER/{group}/mine.yaml
  --cfg job               show the configuration instead of running it; also hydra (its own settings) and all
  -sc install=bash        completion: eval "$({program} -sc install=bash)"; also zsh and fish
  --version               the versions of jepa-train, Python and Hydra
  -h, --help              this text, including the groups of --config-dir"""
"""The flags that all commands have."""
SHOWN = ("job", "hydra", "all")
"""What --cfg shows."""
COMPLETION = {"--shell-completion", "-sc"}
Configs = Callable[[Sequence[str], str | None], Iterable[tuple[str, dict[str, Any]]]]
"""(overrides, config_dir) -> a label and the configuration of each run that a command would start"""


def answer(program: str, primary: str, arguments: Sequence[str], configs: Configs | None = None) -> int | None:
    """The exit status of --version, -sc and --cfg job for the command `program`, None if none of them is given.

    Its configuration is conf/`primary`.yaml. Raises ConfigError for wrong overrides.
    """
    if "--version" in arguments:
        print_version(program)
        return 0
    if COMPLETION & {*arguments}:
        from jepa.cli.train import run_hydra

        run_hydra(arguments, {}, primary)
        return 0
    parser = argparse.ArgumentParser(program, add_help=False, allow_abbrev=False)
    parser.add_argument("--cfg", "-c", choices=SHOWN)
    parser.add_argument("--config-dir")
    flags, rest = parser.parse_known_args(list(arguments))
    if flags.cfg is None or {"-h", "--help"} & {*rest}:
        return None
    overrides = [text for text in rest if not text.startswith("-")]
    if flags.cfg == "job":
        show((configs or _configs_of(primary))(overrides, flags.config_dir))
    else:
        _show_hydra(flags.cfg, overrides, flags.config_dir, primary)
    return 0


def show(configs: Iterable[tuple[str, dict[str, Any]]]) -> None:
    """Print the configurations as YAML; several as documents, each under its label."""
    shown = list(configs)
    for label, config in shown:
        print(f"# {label}\n" * (len(shown) > 1) + as_text(config), end="---\n" * (len(shown) > 1))


def _show_hydra(kind: str, overrides: Sequence[str], config_dir: str | None, primary: str) -> None:
    """Print the settings of Hydra ("hydra"), or everything ("all"), of the first run that a command would start."""
    from jepa.cli.train import run_hydra
    from jepa.config import Composer, members, name_as_text

    parsed, errors = Composer(config_dir, primary).parse([name_as_text(text) for text in overrides if "=" in text])
    if errors:
        raise ConfigError(errors)
    folder = ["--config-dir", config_dir] if config_dir else []
    run_hydra([*folder, "--cfg", kind, *next(iter(members(parsed)))], {}, primary)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that all commands have to a parser with a --help of its own; `answer` reads most of them."""
    parser.add_argument("--config-dir", metavar="FOLDER", help="a folder with your own configuration groups")
    parser.add_argument("--cfg", choices=SHOWN, help="show the configuration instead of running it")
    parser.add_argument("-sc", metavar="install=bash", help="completion for bash, zsh or fish")
    parser.add_argument("--version", action="store_true", help="the versions of jepa-train, Python and Hydra")


def print_version(program: str) -> None:
    from importlib.metadata import version

    print(f"{program} {version('jepa-train')} (Python {sys.version.split()[0]}, Hydra {version('hydra-core')})")


def as_text(config: Any) -> str:
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True).removesuffix("...\n")


def _configs_of(primary: str) -> Configs:
    """The configurations that conf/PRIMARY.yaml and overrides compose, also with missing values and without data."""

    def configs(overrides: Sequence[str], config_dir: str | None) -> Iterable[tuple[str, dict[str, Any]]]:
        from jepa.config import Composer, members, name_as_text, with_run_data

        composer = Composer(config_dir, primary)
        composer.needs_data = False
        if primary == "eval":
            overrides = with_run_data(overrides, config_dir)
        parsed, errors = composer.parse([name_as_text(text) for text in overrides if "=" in text])
        shown = []
        for chosen in members(parsed):
            config, found = composer.check(chosen)
            errors += [error for error in found if not error.endswith("=VALUE")]
            shown.append((" ".join(chosen), config))
        if errors:
            raise ConfigError(errors)
        return shown

    return configs
