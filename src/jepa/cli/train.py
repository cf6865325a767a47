"""jepa-train: checks a configuration and trains it; torch is imported only once nothing is left to refuse."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial, update_wrapper

from jepa.config.catalogue import conf_folder

HYDRAS_OWN = {"--shell-completion", "-sc", "--hydra-help", "--version", "--info", "-i", "--experimental-rerun"}


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0, 2 for a configuration that is refused, 128 plus the signal that stopped the training.

    Of a sweep 1 where a member has failed.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if {"--help", "-h"} & set(given):
        from jepa.cli.help import help_text

        with suppress(BrokenPipeError):  # a pager or `head` that has seen enough
            print(help_text(given), flush=True)
        return 0

    from jepa.errors import ConfigError

    sweep, config = None, {}
    try:
        if not HYDRAS_OWN & {argument.partition("=")[0] for argument in given}:
            from jepa.cli.preflight import preflight

            given, sweep, config = preflight(given)
    except ConfigError as error:
        from jepa.cli.terminal import report_error

        return report_error(error)
    if sweep is not None:
        from jepa.cli.sweep_run import run_sweep

        return run_sweep(sweep, partial(_hand_over, given, config))
    _hand_over(given, config)
    return 0


def _hand_over(arguments: Sequence[str], config: dict) -> None:
    import hydra

    from jepa.cli.job import job

    sys.argv = [sys.argv[0], *arguments]
    task = update_wrapper(partial(job, checked=config), job) if config else job
    hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name="train")(task)()


if __name__ == "__main__":
    sys.exit(main())
