"""Parses a command line as Hydra does and reports all errors in it before torch is imported."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override

from jepa.cli.answers import as_text, show
from jepa.cli.sweep_plan import Sweep, member_overrides, missing_plugins, plan_sweep, with_sweep_files
from jepa.config import Composer, ConfigError, name_as_text
from jepa.config.catalogue import find
from jepa.config.compose import ABSENT
from jepa.suggestions import suggestion


def preflight(arguments: Sequence[str]) -> tuple[list[str], Sweep | None, dict] | None:
    """Arguments for Hydra, the sweep that they start, if any, and the configuration of a single run.

    None if the configuration of a single run was only to be shown: it is printed as it would be trained.
    Raises ConfigError with all errors, for a sweep those of every member.
    """
    parser = get_args_parser()
    parser.exit_on_error = False
    try:
        flags, unknown = parser.parse_known_intermixed_args(list(arguments))
    except argparse.ArgumentError as error:
        raise ConfigError([str(error)]) from error
    flag_names = [name for action in parser._actions for name in action.option_strings]
    errors = [_unknown_flag(flag, flag_names) for flag in unknown]

    composer = Composer(flags.config_dir, flags.config_name or "train")
    composer.needs_data = not flags.cfg
    given: list[str] = flags.overrides
    overrides = list(map(name_as_text, given))
    parsed, syntax_errors = composer.parse(overrides)
    errors += syntax_errors
    settings, sweep, config = list(composer.hydra_defaults), None, {}
    if plugin_errors := [*missing_plugins(composer, parsed)]:
        errors += plugin_errors
    elif flags.multirun or any(override.input_line == "hydra.mode=MULTIRUN" for override in parsed):
        if flags.cfg:
            return _show_sweep(flags.cfg, composer, parsed, errors)
        sweep, sweep_errors = plan_sweep(composer, parsed, settings)
        errors += sweep_errors
    else:
        sweep_files = [o for o in parsed if o.key_or_group == "sweep" and o.value() is not None]
        errors += [f"{o.input_line}: starts several runs, which needs --multirun" for o in sweep_files]
        config, config_errors = composer.check([o.input_line or "" for o in parsed])
        errors += config_errors
    if flags.cfg:
        errors = [error for error in errors if not error.endswith("=VALUE")]  # --cfg also shows missing values
    if errors:
        raise ConfigError(errors)
    if flags.cfg == "job" and config:
        _print_config(config, flags.package)
        return None
    hydra_arguments = [argument for argument in arguments if argument not in given] + settings + overrides
    return hydra_arguments, None if flags.cfg or flags.info else sweep, config


def _show_sweep(kind: str, composer: Composer, parsed: Sequence[Override], errors: list[str]) -> None:
    """Print the configuration of every member of a sweep. Raises ConfigError for `errors` and those of the members."""
    overrides, more = with_sweep_files(composer, parsed)
    checked = {" ".join(chosen): composer.check(chosen) for chosen in member_overrides(composer, overrides)}
    errors = [*errors, *more, *(error for result in checked.values() for error in result.errors)]
    if kind != "job":
        errors = [f"--cfg {kind}: shows one run; leave out --multirun, or use --cfg job"]
    if errors := [error for error in errors if not error.endswith("=VALUE")]:
        raise ConfigError(errors)
    show((label, result.config) for label, result in checked.items())


def _print_config(config: dict[str, Any], package: str | None) -> None:
    """Print the configuration as YAML, or the section of a dotted key. Raises ConfigError if there is no such key."""
    section = find(config, package, ABSENT) if package else config
    if section is ABSENT:
        raise ConfigError([f"--package {package}: there is no such key"])
    print(f"# @package {package}\n" * bool(package) + as_text(section), end="")


def _unknown_flag(flag: str, flag_names: Sequence[str]) -> str:
    name, _, value = flag.partition("=")
    key = name.lstrip("-").replace("-", "_")
    hint = suggestion(name, flag_names) or f"; keys are given without dashes, as {key}={value or 'VALUE'}"
    return f"{flag}: there is no such flag{hint}"


def as_checked() -> dict[str, Any]:
    """The checked configuration of this Hydra job, without the sections that no component reads."""
    hydra = HydraConfig.get()
    folders = [source.path for source in hydra.runtime.config_sources if source.provider == "command-line"]
    composer = Composer(folders[0] if folders else None, hydra.job.config_name or "train")
    composer.run_folder = Path(hydra.runtime.output_dir)
    return composer.compose(list(hydra.overrides.task))
