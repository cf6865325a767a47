"""Stands in for data that are not on this machine when a run is estimated, and says what was assumed."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from jepa.config import ConfigError, TrainConfig, build_with
from jepa.config.urls import is_url
from jepa.errors import as_config_errors
from jepa.training.assemble import make_dataset, objective_needs
from jepa.types import ActionSpace, Field

IMAGENET, COCO, WINDOWS = (1_281_167, 1000), (118_287, 80), (100_000, 0)
"""Samples and classes of ImageNet-1k and of COCO train2017, and windows of episodes of which no number is given."""
ACTIONS = ActionSpace(low=(-1.0, -1.0), high=(1.0, 1.0))
"""Assumed where neither episodes nor an environment say what the actions are."""


class AssumedData:
    """Data of stated sizes; there are no samples to read."""

    def __init__(
        self, *, num_samples: int, channels: int, classes: int, fields: Mapping[str, Field], words: str = ""
    ) -> None:
        self.num_samples, self.channels, self.fields, self.words = num_samples, channels, fields, words
        self.classes = tuple(map(str, range(classes)))
        self.mean = self.std = (0.5,) * channels

    def __len__(self) -> int:
        return self.num_samples

    def describe(self, index: int) -> str:
        return f"sample {index}"

    def __str__(self) -> str:
        in_classes = f" in {len(self.classes):,} classes" if self.classes else ""
        channels = f"{self.channels} channel{'s' * (self.channels > 1)}"
        return f"{len(self):,} samples of {channels}{in_classes}{self.words}"


def find_dataset(config: TrainConfig) -> tuple[Any, str]:
    """The data set, which is not downloaded, or `AssumedData` in its place with a line that says so and why.

    Raises ConfigError if the objective learns from a field of which nothing can be assumed.
    """
    node = config.dataset
    try:
        with as_config_errors():
            if any(is_url(node.get(key)) for key in ("path", "shards")):
                raise ValueError("an estimate asks no server")
            if "path" in node and not Path(node["path"]).expanduser().exists():
                raise ValueError(f"there is no {node['path']} on this machine")
            return make_dataset(replace(config, dataset=node | {"download": False} if "download" in node else node)), ""
    except ConfigError as error:
        if not {"root_path", "path", "shards"} & node.keys():
            raise
        dataset = _assume(config)
        if {*objective_needs(config)} - {"labels"} - dataset.fields.keys():
            raise
        return dataset, f"\nassumed: {dataset}, as the data are not here ({error.errors[0]})"


def _assume(config: TrainConfig) -> AssumedData:
    """From the keys of the data set what they tell, and the rest in common sizes."""
    node = config.dataset
    declared = getattr(resolve_name(node["_target_"]), "fields", {})
    if "actions" in declared:
        return _episodes(node, config.num_frames)
    channels = node.get("channels") or (1 if str(node.get("name")).endswith("mnist") else 3)
    fields = {name: field for name, field in declared.items() if isinstance(field, Field)}
    num_samples, classes = COCO if "boxes" in fields else IMAGENET
    return AssumedData(
        num_samples=num_samples, channels=channels, classes=len(node.get("classes") or ()) or classes, fields=fields
    )


def _episodes(node: Mapping[str, Any], num_frames: int) -> AssumedData:
    """Windows of episodes that are not collected yet, or lie elsewhere; their environment says what it can."""
    actions, channels, source = ACTIONS, 3, ""
    if node.get("env"):
        with suppress(ValueError, ImportError):  # as where the package of the environment is not installed
            resolve_name(node["env"]["_target_"])
            env = build_with(node["env"])
            actions, channels, source = env.actions, env.frame_shape[0], f" of {type(env).__name__}"
    episodes, (num_samples, _) = node.get("episodes"), WINDOWS
    if episodes:
        windows = max(1, (node["steps"] - (num_frames - 1) * node["frame_skip"]) // node["hop"] + 1)
        num_samples = max(1, round(episodes * (1 - node["val_ratio"]))) * windows
    steps, block = num_frames - 1, () if node["frame_skip"] == 1 else (node["frame_skip"],)
    dtype = "int64" if actions.is_discrete else "float32"
    fields = {name: Field(shape=(steps,)) for name in ("rewards", "terminated", *["valid"] * node["pad"])}
    fields["actions"] = Field(shape=(steps, *block, *actions.shape), dtype=dtype, space=actions)
    kind = f"{actions.num_actions} discrete actions" if actions.is_discrete else f"actions of {actions.size} numbers"
    words = f", {kind}{source}{', episodes of full length' if episodes else ''}"
    fields = fields if steps else {}
    return AssumedData(num_samples=num_samples, channels=channels, classes=0, fields=fields, words=words)
