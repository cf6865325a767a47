"""What a run says of its head and of the files that it was trained on, read from config.yaml without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jepa.config.checkpoints import locate
from jepa.config.files import Fields, as_mapping, read_yaml
from jepa.config.paths import find_source
from jepa.types import Positive, PositiveInt

CLASSES, BOXES = "classes", "boxes"
HEADS = {"jepa.objectives.classify.Classification": CLASSES, "jepa.objectives.detect.Detector": BOXES}
"""Objectives whose head predicts something of a picture: `_target_` -> what."""
FILE_FIELDS: Fields = {
    "max_value": Positive | None,  # pyright: ignore[reportOperatorIssue]
    "fps": Positive | None,  # pyright: ignore[reportOperatorIssue]
    "stride": PositiveInt | None,  # pyright: ignore[reportOperatorIssue]
    "short": str | None,
}
"""Keys of a data set that decide how its files are read."""


def stored_config(run: str) -> dict[str, Any]:
    """config.yaml of the checkpoint that `run=` names; empty for a source that is no run.

    Raises ValueError for a source that does not exist, FileError for a damaged file.
    """
    if find_source(run).kind != "run":
        return {}
    checkpoint = locate(Path(run).expanduser())
    if checkpoint is None or not (checkpoint / "config.yaml").is_file():
        raise ValueError(f"{checkpoint or run} holds no checkpoint with a config.yaml")
    return read_yaml(checkpoint / "config.yaml", {"objective": dict, "dataset": dict})


def head_of(config: dict[str, Any]) -> str:
    """What the head of a stored configuration predicts: classes, boxes, or nothing ("")."""
    return HEADS.get(config.get("objective", {}).get("_target_"), "")


def file_settings(config: dict[str, Any]) -> dict[str, Any]:
    """The keys of its data set that decide how files are read, as far as they are given."""
    node = as_mapping(config.get("dataset", {}), "config.yaml: dataset", FILE_FIELDS)
    return {key: node[key] for key in FILE_FIELDS if node.get(key) is not None}
