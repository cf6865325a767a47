"""jepa-play: watches a policy, a script or typed keys in the environment and in a dream, side by side."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jepa.cli.overrides import run_overrides
from jepa.cli.terminal import quick_imports, setup_logging

HEAD = """\
jepa-play shows an episode in the environment and in the dream of a world model at once, under the same actions.

usage: jepa-play run=RUN [key=value ...] [flags]

  jepa-play run=outputs/minigrid_jepa                 the policy, which acts on what it dreams
  jepa-play run=outputs/minigrid_jepa actions=[2,2,1,2]
  jepa-play run=outputs/minigrid_jepa actions=actions.txt   a file with one action a line
  jepa-play run=outputs/minigrid_jepa typed=true keys={w:2,a:0,d:1}   reads lines of keys from the terminal

Writes play.html, which reloads itself while actions are typed, and play.mp4 into RUN/play."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 if it failed, 2 for an error in the arguments, 130 after Ctrl-C."""
    return run_overrides("play", _run, arguments, head=HEAD, group="env", stopped="stopped")


def _run(overrides: Sequence[str], config_dir: str | None) -> int:
    from jepa.config import as_config_errors, compose_play

    config = compose_play(overrides, config_dir)
    setup_logging()
    with quick_imports(config):
        from jepa.rl.play import play

    with as_config_errors():
        page = play(config)
    print(f"page: {page}\nvideo: {page.with_suffix('.mp4')}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
