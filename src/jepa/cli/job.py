"""The function that Hydra runs for each job; in a module of its own, because launchers import it by name."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from jepa.cli.preflight import as_checked
from jepa.cli.sweep_member import train_member
from jepa.cli.sweep_run import FAILURE
from jepa.cli.sweep_signals import unblocked
from jepa.cli.terminal import quick_imports, rank, report_error, setup_logging
from jepa.config import ConfigError, TrainConfig, to_dataclass
from jepa.config.machine import check_costly_default, check_start, check_writable
from jepa.errors import RunError, as_run_errors
from jepa.parallel.signals import FROM_SCHEDULERS, STOPS, listen
from jepa.reports.console import opening_lines
from jepa.reports.verdict import last_selection_value
from jepa.runs.metrics import read_rows, write_atomically
from jepa.training.launch import num_processes, start_processes


def job(config: DictConfig, checked: dict | None = None) -> float | None:
    """Train one configuration in its run folder; exits the process if the status is not 0.

    `checked` is the checked configuration of a single run; a member of a sweep is checked in the process that runs it.
    Returns the last value of the selection metric, for the sweeper. If a member of a sweep fails, the others go on: it
    returns None and writes its error into its folder.
    """
    hydra = HydraConfig.get()
    is_member = hydra.mode == RunMode.MULTIRUN
    folder = Path(hydra.runtime.output_dir)
    if folder.is_relative_to(Path.cwd()):
        folder = folder.relative_to(Path.cwd())
    setup_logging()
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(STOPS)
    if blocked & signal.sigpending():
        return None  # the sweep was stopped
    try:
        with as_run_errors(), unblocked(blocked):
            checked_config = to_dataclass(as_checked() if is_member or checked is None else checked)
            typed = list(hydra.overrides.task) if hydra.job.config_name == "train" else None
            train = partial(_train, typed=typed)
            status = train_member(checked_config, folder, train) if is_member else train(checked_config, folder)
        if status == 0:
            return last_selection_value(read_rows(folder), checked_config.evaluation.judge)
    except SystemExit as exit:
        if not blocked:
            raise
        status = int(exit.code or 0)
    except (ConfigError, RunError) as error:
        status = report_error(error, f"{folder}: " * is_member)
        if is_member and rank() == 0:
            with suppress(OSError):  # where the error is that nothing can be written
                write_atomically(folder / FAILURE, str(error))
    if blocked and status > 128:
        signal.raise_signal(status - 128)  # stays pending, so that this worker starts no other member
    elif not is_member or (status > 128 and hydra.launcher._target_.endswith("BasicLauncher")):
        sys.exit(status)
    return None


def _train(config: TrainConfig, folder: Path, *, typed: list[str] | None) -> int:
    """Train, or estimate, in this process or in one per GPU; returns the exit status.

    `typed` are the overrides of jepa-train itself.
    """
    if config.estimate:
        with quick_imports():
            from jepa.resources import estimate

        return estimate.print_estimate(config, folder) if rank() == 0 else 0
    check_start(config)
    check_writable(folder)
    check_costly_default(config, typed, folder)
    if rank() == 0:
        print("".join(opening_lines(asdict(config), folder)), end="", file=sys.stderr, flush=True)
    with listen(signals=FROM_SCHEDULERS) as interrupt:
        with quick_imports():
            if (count := num_processes(config, os.environ)) == 1:
                importlib.import_module("jepa.agent")
        if count > 1:  # this process itself does not import torch if there is no GPU
            return 128 + interrupt.signum if interrupt.signum else start_processes(config, folder, count)
        from jepa.agent import train

        return train(config, folder, interrupt)
