"""What jepa-eval, -embed, -predict, -export, -collect, -plan, -rl and -play take: a run, overrides and flags."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from jepa.cli.answers import FLAGS, Configs, answer
from jepa.cli.help import print_help
from jepa.cli.terminal import STOPPED, run_command

Run = Callable[[Sequence[str], str | None], int]


def run_overrides(
    name: str, run: Run, arguments: Sequence[str] | None, *, head: str, group: str = "dataset", stopped: str = STOPPED,
    configs: Configs | None = None,
) -> int:  # fmt: skip
    """`run(overrides, config_dir)` of the command jepa-NAME, its --help with the keys of conf/NAME.yaml, or an answer.

    Words that stand first are the run. Returns the exit status: that of `run`, 2 for an error in the arguments, 130
    after Ctrl-C. `group` is one of its groups, as an example.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(f"jepa-{name}", add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--config-dir")
    parser.add_argument("-h", "--help", action="store_true")
    flags = FLAGS.format(program=parser.prog, group=group)

    def command() -> int:
        status = answer(parser.prog, name, with_run(given), configs)
        if status is not None:
            return status
        parsed = parser.parse_intermixed_args(given)
        if parsed.help:
            return print_help(given, name, head, flags)
        return run(with_run(parsed.overrides), parsed.config_dir)

    return run_command(parser.prog, command, stopped=stopped)


def with_run(words: Sequence[str]) -> list[str]:
    """The arguments, in which the words before the first override or flag have become `run=`."""
    from jepa.config import override_literal

    is_other = [word.startswith("-") or ("=" in word and not os.path.exists(word)) for word in words]
    count = (*is_other, True).index(True)
    runs = list(words[:count])
    return [*([f"run={override_literal(runs if count > 1 else runs[0])}"] if runs else []), *words[count:]]
