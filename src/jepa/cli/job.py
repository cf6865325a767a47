"""What Hydra runs, here or where its launcher chose; a file of its own, since a launcher imports it by name."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from jepa.config import ConfigError, typed
from jepa.types import RunError


def job(config: DictConfig) -> None:
    """Train one configuration in its run folder; leaves with the exit status when that is not 0."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    if folder.is_relative_to(Path.cwd()):
        folder = folder.relative_to(Path.cwd())
    checked = typed(config)
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    from jepa.agent import train  # imports torch

    try:
        status = train(checked, folder)
    except ConfigError as error:
        print(f"jepa-train: {error}", file=sys.stderr)
        status = 2
    except RunError as error:
        print(f"jepa-train: {error}", file=sys.stderr)
        status = 1
    if status:
        sys.exit(status)
