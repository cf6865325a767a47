"""Reads a command line as Hydra will, and refuses all that is wrong with it before torch is imported."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig

from jepa.cli.sweep_plan import Sweep, lacking_plugins, plan_sweep, sweep_files
from jepa.config import Composer, ConfigError


def preflight(arguments: Sequence[str]) -> tuple[list[str], Sweep | None, dict]:
    """The arguments to hand to Hydra, the sweep that they start, if any, and the configuration of a single run.

    Raises ConfigError with all faults, those of every member of a sweep.
    """
    parser = get_args_parser()
    parser.exit_on_error = False
    try:
        flags, unknown = parser.parse_known_intermixed_args(list(arguments))
    except argparse.ArgumentError as error:
        raise ConfigError([str(error)]) from error
    known = [name for action in parser._actions for name in action.option_strings]
    faults = [_unknown_flag(flag, known) for flag in unknown]

    composer = Composer(flags.config_dir, flags.config_name or "train")
    overrides: list[str] = flags.overrides
    parsed, unread = composer.parse(overrides)
    faults += unread
    settings, sweep, config = list(composer.settings), None, {}
    if lacking := [*lacking_plugins(composer, parsed)]:
        faults += lacking
    elif flags.multirun or any(override.input_line == "hydra.mode=MULTIRUN" for override in parsed):
        sweep, found = plan_sweep(composer, parsed, settings)
        faults += found
    else:
        faults += [f"{o.input_line}: starts several runs, which needs --multirun" for o in sweep_files(parsed)]
        config, found = composer.inspect([o.input_line or "" for o in parsed])
        faults += found
    if flags.cfg:
        faults = [fault for fault in faults if not fault.endswith("=VALUE")]  # the one way to see what must be given
    if faults:
        raise ConfigError(faults)
    given = [argument for argument in arguments if argument not in overrides] + settings + overrides
    return given, None if flags.cfg or flags.info else sweep, config


def _unknown_flag(flag: str, known: Sequence[str]) -> str:
    name, _, value = flag.partition("=")
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"{flag}: there is no such flag; did you mean {near[0]}?"
    key = name.lstrip("-").replace("-", "_")
    return f"{flag}: there is no such flag; keys are given without dashes, as {key}={value or 'VALUE'}"


def as_checked() -> dict[str, Any]:
    """The configuration of this job as it was checked, which is Hydra's without what nothing reads."""
    hydra = HydraConfig.get()
    own = [source.path for source in hydra.runtime.config_sources if source.provider == "command-line"]
    found = Composer(own[0] if own else None, hydra.job.config_name or "train").inspect(list(hydra.overrides.task))
    if found.faults:
        raise ConfigError(found.faults)
    return found.config
