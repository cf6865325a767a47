"""The arguments of jepa-finetune as arguments of jepa-train. Without torch."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise

from jepa.config.paths import find_source, shape_of
from jepa.config.run_data import names_data, run_data
from jepa.errors import ConfigError

WITHOUT_WEIGHTS = {
    "encoder",
    "experiment",
    "--cfg",
    "-c",
    "--config-name",
    "-cn",
    "--version",
    "-sc",
    "--shell-completion",
}
"""Keys and flags that may replace `run=`: they choose the weights, or only print the configuration."""


def to_train_arguments(arguments: Sequence[str]) -> list[str]:
    """Translate `run=` for jepa-train, and add the data of the run and the input size of the weights if not set.

    Raises ConfigError if the weights are missing or have several input sizes.
    """
    weights, translated = [], []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key in ("run", "encoder.weights"):
            weights, argument = value.split(","), f"encoder.weights={value}"
        translated.append(argument)
    keys = {argument.partition("=")[0] for argument in arguments}
    if not weights and not keys & WITHOUT_WEIGHTS:
        raise ConfigError(["run: the weights to start from are missing; give run=outputs/NAME"])
    shapes = set()
    for text in weights:
        with suppress(ValueError, OSError):  # the check of the configuration reports it with all other errors
            shapes.add(shape_of(find_source(text.strip("'\" "))))
    if len(shapes) > 1 and not {"image_size", "num_frames"} <= keys:
        raise ConfigError([f"run={','.join(weights)}: the input sizes differ; set image_size= and num_frames="])
    if not names_data(arguments):
        translated = [*run_data([text.strip("'\" ") for text in weights], _config_dir(arguments)), *translated]
    for _, frames, height, width in shapes - {None}:
        sizes = {"image_size": f"[{height},{width}]", "num_frames": f"{frames}"}
        translated += [f"{key}={value}" for key, value in sizes.items() if key not in keys]
    return translated


def _config_dir(arguments: Sequence[str]) -> str | None:
    """The folder of `--config-dir FOLDER`, if it is given."""
    given = dict(pairwise(arguments))
    joined = (text.partition("=")[2] for text in arguments if text.startswith("--config-dir="))
    return given.get("--config-dir") or given.get("-cd") or next(joined, None)
