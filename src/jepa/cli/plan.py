"""jepa-plan: plans with world models, measured against baselines on frozen tasks."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jepa.cli.overrides import run_overrides
from jepa.cli.terminal import quick_imports, setup_logging
from jepa.config.schema import PlanConfig
from jepa.runs.metrics import read_ending

if TYPE_CHECKING:
    from jepa.config import Composer
    from jepa.planning.worlds import WorldRun

log = logging.getLogger(__name__)

HEAD = """\
jepa-plan reaches goals with the plans of a world model: a table with intervals, baselines, film strips and a video.

usage: jepa-plan run=RUN [planner=CHOICE] [cost=CHOICE] [key=value ...] [flags]

  jepa-plan experiment=two_rooms                      collects episodes, trains the world model, then plans with it
  jepa-plan experiment=two_rooms compare=encoders     the same on encoders of JEPA, MAE, VAE, autoencoder, and on pixels
  jepa-plan run=outputs/two_rooms planner=icem cost=latent_l2
  jepa-plan run=[outputs/a,outputs/b] name=both       several worlds in one table
  jepa-plan run=outputs/two_rooms cost=[gc_value,control] planner.horizon=24
  jepa-plan run=outputs/two_rooms open_loop=true      trajectory optimisation: one plan, executed to its end

The result is results.json, tasks.json, plan.html and media/*.mp4 in outputs/NAME; the same command again repeats
nothing that is done."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 if it failed, 2 for an error in the arguments, 130 after Ctrl-C."""
    return run_overrides("plan", _run, arguments, head=HEAD, group="planner")


def _run(overrides: Sequence[str], config_dir: str | None) -> int:
    from jepa.config import Composer, as_config_errors, compose_plan
    from jepa.planning.worlds import experiment_runs, with_planner

    chosen, reason = with_planner(overrides, config_dir)
    config = compose_plan(chosen, config_dir)
    setup_logging()
    if reason:
        log.info("%s, %s", chosen[-1], reason)
    composer = Composer(config_dir)
    planned = experiment_runs(config, composer) if config.experiment else []
    with quick_imports(config):
        from jepa.planning.report import terminal
        from jepa.planning.run import plan

    for number, run in enumerate(planned, start=1):
        log.info("world %d of %d: %s", number, len(planned), run.name)
        _train(run, composer)
    worlds = {run.name: Path("outputs", run.name) for run in planned} or _runs(config)
    with as_config_errors():
        results = plan(config, worlds, {run.name: run.encoder for run in planned if run.encoder})
    print(terminal(results, Path("outputs", config.name)), flush=True)
    return 0


def _runs(config: PlanConfig) -> dict[str, Path]:
    """Run folders by the names that stand in the table."""
    runs = config.run if isinstance(config.run, list) else [config.run]
    return {str(run).rstrip("/").removeprefix("outputs/"): Path(run).expanduser() for run in runs}


def _train(run: WorldRun, composer: Composer) -> None:
    """Collect episodes and train the encoder and the world, as far as they are not there yet."""
    from jepa.agent import JEPAAgent

    for config in run.stages(composer):
        agent = JEPAAgent(config)
        agent.train()
        if read_ending(agent.folder).get("status") != "finished":
            raise KeyboardInterrupt  # a signal stopped it, and everything is saved


if __name__ == "__main__":
    sys.exit(main())
