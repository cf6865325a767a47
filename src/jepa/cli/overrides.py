"""What jepa-eval, -embed, -predict, -collect, -plan, -rl and -play take: overrides, --config-dir, --help."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from jepa.cli.help import print_help
from jepa.cli.terminal import STOPPED, run_command


def run_overrides(
    name: str, run: Callable[[Sequence[str], str | None], int], arguments: Sequence[str] | None, *, head: str,
    flags: str, stopped: str = STOPPED,
) -> int:  # fmt: skip
    """`run(overrides, config_dir)` of the command jepa-NAME, or its --help with the keys of conf/NAME.yaml.

    Returns the exit status: that of `run`, 2 for an error in the arguments, 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(f"jepa-{name}", add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--config-dir")
    parser.add_argument("-h", "--help", action="store_true")
    parsed = parser.parse_intermixed_args(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    if parsed.help:
        return run_command(parser.prog, lambda: print_help(given, name, head, flags))
    return run_command(parser.prog, lambda: run(parsed.overrides, parsed.config_dir), stopped=stopped)
