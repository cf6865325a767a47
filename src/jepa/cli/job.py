"""What Hydra runs, here or where its launcher chose; a file of its own, since a launcher imports it by name."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from jepa.cli.preflight import as_checked
from jepa.cli.sweep_run import FAILURE
from jepa.cli.sweep_signals import unblocked
from jepa.cli.terminal import quick_imports, rank, report_error, setup_logging
from jepa.config import ConfigError, TrainConfig, changed_keys, to_dataclass
from jepa.errors import RunError
from jepa.parallel.signals import FROM_SCHEDULERS, STOPS, listen
from jepa.reports.verdict import last_selection_value
from jepa.runs.metrics import read_config, read_json, read_rows, write_atomically
from jepa.training.launch import num_processes, start_processes


def job(config: DictConfig, checked: dict | None = None) -> float | None:
    """Train one configuration in its run folder; leaves with the exit status when that is not 0.

    A single run is `checked` by the process that starts it, a member of a sweep here, which may be elsewhere.
    A sweeper gets the last value of the metric that decides. A member of a sweep that fails ends none of the others: it
    returns None, and what it says stays in its folder.
    """
    hydra = HydraConfig.get()
    is_member = hydra.mode == RunMode.MULTIRUN
    folder = Path(hydra.runtime.output_dir)
    if folder.is_relative_to(Path.cwd()):
        folder = folder.relative_to(Path.cwd())
    setup_logging()
    held = signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(STOPS)
    if held & signal.sigpending():
        return None  # the sweep is being stopped
    try:
        with unblocked(held):
            whole = to_dataclass(as_checked() if is_member or checked is None else checked)
            status = _train(whole, folder, is_member)
        if status == 0:
            return last_selection_value(read_rows(folder), whole.evaluation.judge)
    except SystemExit as left:
        if not held:
            raise
        status = int(left.code or 0)
    except (ConfigError, RunError) as error:
        status = report_error(error, f"{folder}: " * is_member)
        if is_member and rank() == 0:
            write_atomically(folder / FAILURE, str(error))
    if held and status > 128:
        signal.raise_signal(status - 128)  # stays with this worker, which begins no other member
    elif not is_member or (status > 128 and hydra.launcher._target_.endswith("BasicLauncher")):
        sys.exit(status)
    return None


def _train(config: TrainConfig, folder: Path, is_member: bool) -> int:
    if config.estimate:
        with quick_imports():
            from jepa.resources import estimate

        return estimate.tell(config, folder) if rank() == 0 else 0
    if is_member and rank() == 0:
        (folder / FAILURE).unlink(missing_ok=True)
    if is_member and _is_finished(folder, config):
        if rank() == 0:
            print(f"{folder} is finished", flush=True)
        return 0
    count = num_processes(config, os.environ)
    if count > 1:
        return start_processes(config, folder, count)  # which import torch: this process need not
    with listen(signals=FROM_SCHEDULERS) as interrupt:
        with quick_imports():
            from jepa.agent import train

        return train(config, folder, interrupt)


def _is_finished(folder: Path, config: TrainConfig) -> bool:
    """Whether this very run is; of another the training tells what differs."""
    is_over = read_json(folder / "run.json").get("status") == "finished"
    return is_over and not changed_keys(read_config(folder), asdict(config))
