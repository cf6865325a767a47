"""jepa-collect: collects episodes of an environment, or imports recorded ones, into a store for dataset=episodes."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from jepa.cli.overrides import run_overrides
from jepa.cli.terminal import setup_logging
from jepa.config.machine import check_start
from jepa.config.schema import CollectConfig
from jepa.errors import ConfigError

HEAD = """\
jepa-collect collects episodes of an environment into outputs/NAME, which jepa-train reads with dataset=episodes.

usage: jepa-collect [env=CHOICE] [policy=CHOICE] [episodes=N] [key=value ...] [flags]

  jepa-collect env=two_rooms policy=sticky_random episodes=2500 steps=40 name=rooms
  jepa-collect env=gym env.id=CartPole-v1 policy=random episodes=100
  jepa-collect env=point_maze policy=expert policy.random=0.2
  jepa-collect name=logs source=frames:./logs             imports recordings; lerobot:, minari:, frames:
  jepa-collect env=two_rooms export=minari:./exported     also writes the store in another format

The same command again goes on where it was, and does nothing when all episodes are there."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 if it failed, 2 for an error in the arguments, 130 after Ctrl-C."""
    return run_overrides("collect", _run, arguments, head=HEAD, group="env")


def _run(overrides: Sequence[str], config_dir: str | None) -> int:
    from jepa.config import compose_collect
    from jepa.data.episode_store import EpisodeStore
    from jepa.reports.episodes import summary

    config = compose_collect(overrides, config_dir)
    if config.source and not any(override.startswith("name=") for override in overrides):
        raise ConfigError([f"source={config.source}: give name=NAME, the folder below outputs/ that is written"])
    setup_logging()
    check_start(config)
    folder = Path("outputs", config.name)
    speed = _import(config.source, folder) if config.source else _collect(config, folder)
    if config.export:
        from jepa.data.exchange import write_export

        write_export(config.export, folder)
    print(summary(EpisodeStore(folder), speed), flush=True)
    return 0


def _collect(config: CollectConfig, folder: Path) -> float:
    """Frames per second of the episodes that were not there yet, 0 if all were."""
    from jepa.config import as_config_errors, build_with
    from jepa.data.collect import collect
    from jepa.data.episode_store import EpisodeStore

    with as_config_errors():
        env, policy = build_with(config.env), build_with(config.policy)
    num_known = len(EpisodeStore(folder)) if (folder / "store.json").exists() else 0
    start = time.perf_counter()
    store = collect(
        folder, env=env, policy=policy, num_episodes=config.episodes, num_steps=config.steps, seed=config.seed
    )
    seconds = time.perf_counter() - start
    env.close()
    return float((store.lengths[num_known:] + 1).sum() / seconds)


def _import(source: str, folder: Path) -> float:
    from jepa.data.exchange import read_source

    read_source(source, folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
