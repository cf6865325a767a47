"""jepa-rl: reinforcement learning in the imagination of a world model, beside baselines."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jepa.cli.overrides import run_overrides
from jepa.cli.terminal import quick_imports, setup_logging

HEAD = """\
jepa-rl trains a world model of an environment, and a policy in its dreams: a table with intervals, baselines, a video.

usage: jepa-rl [rl=RECIPE] [env=CHOICE] [world=jepa|iris] [key=value ...] [flags]

  jepa-rl rl=minigrid_jepa                            a recipe of conf/rl
  jepa-rl env=minigrid_empty world=iris env_steps=4000
  jepa-rl env=gym env.id=CartPole-v1 world=jepa rounds=10 env_steps=20000
  jepa-rl rl=minigrid_iris baselines=[random,ppo] seed=0,1,2   every combination, and the mean over seeds, in one table
  jepa-rl rl=minigrid_iris "train=['lr=5e-4','objective.num_codes=64']"   overrides of the world's training

The result is results.json, rl.html and media/*.mp4 in outputs/NAME, beside the episodes and the world; a run that was
stopped, wherever, goes on with the same command. Afterwards: jepa-play run=outputs/NAME"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 if it failed, 2 for an error in the arguments, 130 after Ctrl-C."""
    return run_overrides("rl", _run, arguments, head=HEAD, group="env")


def _run(overrides: Sequence[str], config_dir: str | None) -> int:
    from jepa.config import Composer, compose_rl_runs

    folder, configs = compose_rl_runs(overrides, config_dir)
    setup_logging()
    with quick_imports(next(iter(configs.values()))):
        from jepa.rl.report import terminal
        from jepa.rl.run import run, run_all

    composer = Composer(config_dir)
    results = run(configs[""], composer) if "" in configs else run_all(configs, folder, composer)
    print(terminal(results, folder), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
