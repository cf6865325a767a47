"""jepa-train: checks a configuration and trains it; torch is imported only after all checks have passed."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import partial, update_wrapper

from jepa.cli.answers import COMPLETION, print_version
from jepa.cli.help import print_help
from jepa.cli.terminal import STOPPED_AT_ONCE, check_working_folder, interruptible, program_name, report_error
from jepa.config.catalogue import conf_folder
from jepa.errors import ConfigError, RunError, as_run_errors
from jepa.reports.text import print_any_text

HYDRA_FLAGS = {*COMPLETION, "--hydra-help", "--info", "-i", "--experimental-rerun"}
"""Flags with which Hydra does something else than to run a job; the configuration is not checked."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 if a member of a sweep failed, 2 for configuration errors, 128 plus the stopping signal."""
    print_any_text()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    return interruptible(lambda: _checked(arguments), f"{program_name()}: {STOPPED_AT_ONCE}")


def _checked(arguments: Sequence[str]) -> int:
    try:
        with as_run_errors():
            if "--version" in arguments:
                print_version(program_name())
                return 0
            return print_help(arguments) if {"--help", "-h"} & set(arguments) else _train(arguments)
    except (ConfigError, RunError) as error:
        return report_error(error)


def _train(arguments: Sequence[str]) -> int:
    """Check the arguments and start Hydra; returns the exit status."""
    sweep, config = None, {}
    check_working_folder()
    if not HYDRA_FLAGS & {argument.partition("=")[0] for argument in arguments}:
        from jepa.cli.preflight import preflight

        checked = preflight(arguments)
        if checked is None:
            return 0
        arguments, sweep, config = checked
    start = partial(run_hydra, arguments, config)
    if sweep is not None:
        from jepa.cli.sweep_run import run_sweep

        return run_sweep(sweep, start)
    start()
    return 0


def run_hydra(arguments: Sequence[str], config: dict, primary: str = "train") -> None:
    """Run Hydra on conf/PRIMARY.yaml; `config` is the checked configuration of a single run."""
    import hydra

    from jepa.cli.job import job

    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra raises an error, where it would print a traceback and exit
    sys.argv = [sys.argv[0], *arguments]
    task = update_wrapper(partial(job, checked=config), job) if config else job
    hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name=primary)(task)()


if __name__ == "__main__":
    sys.exit(main())
