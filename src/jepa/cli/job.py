"""What Hydra runs, here or where its launcher chose; a file of its own, since a launcher imports it by name."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from jepa.config import Composer, ConfigError, typed
from jepa.folder_log import read_rows
from jepa.types import RunError
from jepa.verdict import judged_value


def job(config: DictConfig) -> float | None:
    """Train one configuration in its run folder; leaves with the exit status when that is not 0.

    A sweeper gets the last value of the metric that decides, `evaluation.judge` or else a probe's.
    """
    folder = Path(HydraConfig.get().runtime.output_dir)
    if folder.is_relative_to(Path.cwd()):
        folder = folder.relative_to(Path.cwd())
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    try:
        checked = typed(_as_checked())
        from jepa.agent import train  # imports torch

        status = train(checked, folder)
        if status == 0:
            return judged_value(read_rows(folder), checked.evaluation.judge)
    except ConfigError as error:
        print(f"jepa-train: {error}", file=sys.stderr)
        status = 2
    except RunError as error:
        print(f"jepa-train: {error}", file=sys.stderr)
        status = 1
    sys.exit(status)


def _as_checked() -> dict[str, Any]:
    """The configuration of this job as it was checked, which is Hydra's without what nothing reads."""
    hydra = HydraConfig.get()
    own = [source.path for source in hydra.runtime.config_sources if source.provider == "command-line"]
    found = Composer(own[0] if own else None, hydra.job.config_name or "train").inspect(list(hydra.overrides.task))
    if found.faults:
        raise ConfigError(found.faults)
    return found.config
