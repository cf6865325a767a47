"""A member of a sweep: what it prints goes to a file in its folder, and one line to the console."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from hydra.core.hydra_config import HydraConfig

from jepa.cli.sweep_run import FAILURE
from jepa.cli.terminal import rank, setup_logging
from jepa.comparison.members import OUTPUT, begun_line, member_line, output_to
from jepa.config import ConfigError, TrainConfig
from jepa.errors import RunError
from jepa.runs.metrics import is_finished


def train_member(config: TrainConfig, folder: Path, train: Callable[[TrainConfig, Path], int]) -> int:
    """Exit status of a member, which is not trained again; estimates and jobs of Slurm print all that they have."""
    if config.estimate:
        return train(config, folder)
    if rank() == 0:
        (folder / FAILURE).unlink(missing_ok=True)
    if is_finished(folder, asdict(config)):
        if rank() == 0:
            print(member_line(folder, "finished", None, config.evaluation.judge), flush=True)
        return 0
    if rank() > 0 or "submitit" in HydraConfig.get().launcher._target_:
        return train(config, folder)
    print(begun_line(folder), end="", flush=True)
    begun, state = time.monotonic(), "failed"
    try:
        status = _train_quietly(config, folder, train)
        state = "finished" if status == 0 else "stopped" if status > 128 else state
        return status
    except SystemExit:
        state = "stopped"
        raise
    finally:
        setup_logging()
        print(member_line(folder, state, time.monotonic() - begun, config.evaluation.judge), flush=True)


def _train_quietly(config: TrainConfig, folder: Path, train: Callable[[TrainConfig, Path], int]) -> int:
    with output_to(folder / OUTPUT):
        setup_logging()
        try:
            return train(config, folder)
        except (ConfigError, RunError) as error:
            print(error, file=sys.stderr)
            raise
