"""jepa-play: watches a policy, a script or typed keys in the environment and in a dream, side by side."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from jepa.cli.help import print_help
from jepa.cli.terminal import quick_imports, run_command, setup_logging

HEAD = """\
jepa-play shows an episode in the environment and in the dream of a world model at once, under the same actions.

usage: jepa-play run=RUN [key=value ...] [flags]

  jepa-play run=outputs/minigrid_jepa                 the policy, which acts on what it dreams
  jepa-play run=outputs/minigrid_jepa actions=[2,2,1,2]
  jepa-play run=outputs/minigrid_jepa actions=actions.txt   a file with one action a line
  jepa-play run=outputs/minigrid_jepa typed=true keys={w:2,a:0,d:1}   reads lines of keys from the terminal

Writes play.html, which reloads itself while actions are typed, and play.mp4 into RUN/play."""
FLAGS = """\
  --config-dir FOLDER     a folder with your own configuration groups, as FOLDER/env/mine.yaml
  -h, --help              this text, including the groups of --config-dir"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 if it failed, 2 for an error in the arguments, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser("jepa-play", add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--config-dir")
    parser.add_argument("-h", "--help", action="store_true")
    flags = parser.parse_intermixed_args(arguments)
    if flags.help:
        return print_help(sys.argv[1:] if arguments is None else arguments, "play", HEAD, FLAGS)
    return run_command("jepa-play", lambda: _run(flags.overrides, flags.config_dir))


def _run(overrides: Sequence[str], config_dir: str | None) -> int:
    from jepa.config import as_config_errors, compose_play

    config = compose_play(overrides, config_dir)
    setup_logging()
    with quick_imports():
        from jepa.rl.play import play

    with as_config_errors():
        page = play(config)
    print(f"page: {page}\nvideo: {page.with_suffix('.mp4')}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
