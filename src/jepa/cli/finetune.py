"""jepa-finetune: jepa-train with labels, from the weights of an encoder; the same loop, checkpoints and reports."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress

from jepa.cli.help import help_text
from jepa.cli.terminal import report_error
from jepa.cli.train import main as train
from jepa.config.paths import find_source, shape_of
from jepa.errors import ConfigError

HEAD = """\
jepa-finetune trains an encoder and a head on labels, and judges them on the held-out part of the data set.

usage: jepa-finetune run=WEIGHTS [key=value ...] [group=choice ...] [flags]

  jepa-finetune run=outputs/quickstart                  on the data set drawn on the fly
  jepa-finetune run=outputs/cats dataset=imagefolder dataset.root_path=./data epochs=50 name=cats-tuned
  jepa-finetune run=outputs/cats objective.freeze=true lr=2e-2 ...   the head alone, at a higher rate
  jepa-finetune run=outputs/cats encoder.fresh=true ...              the same encoder without its weights
  jepa-finetune run=timm:vit_small_patch16_224.dino image_size=96 ...
  jepa-finetune run=outputs/cells objective=detect dataset=voc dataset.root_path=./voc      boxes

run=WEIGHTS is short for encoder.weights=WEIGHTS: a run or checkpoint, an exported folder, published weights, timm:NAME.
Unless given, image_size and num_frames are those that a run, an exported folder or one of transformers was trained
with. All else is as in jepa-train --help; what begins otherwise is below."""
WITHOUT_WEIGHTS = {"encoder", "experiment", "--cfg", "-c", "--config-name", "-cn"}
"""what else may say what to begin from, or only shows the configuration"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status, as of jepa-train."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if {"--help", "-h"} & set(given):
        with suppress(BrokenPipeError):
            print(help_text(given, "finetune", HEAD), flush=True)
        return 0
    own = ["--config-name", "finetune"] if not {"--config-name", "-cn"} & set(given) else []
    try:
        return train([*own, *translated(given)])
    except ConfigError as error:
        return report_error(error)


def translated(arguments: Sequence[str]) -> list[str]:
    """The arguments of jepa-train; sizes that are not given are those of the weights, where these tell.

    Raises ConfigError where there are no weights, or of several sizes.
    """
    weights, found = [], []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key in ("run", "encoder.weights"):
            weights, argument = value.split(","), f"encoder.weights={value}"
        found.append(argument)
    keys = {argument.partition("=")[0] for argument in arguments}
    if not weights and not keys & WITHOUT_WEIGHTS:
        raise ConfigError(["run: must be given, as run=outputs/NAME: the weights to go on from"])
    shapes = set()
    for text in weights:
        with suppress(ValueError):  # told, with all other faults, by the check of the configuration
            shapes.add(shape_of(find_source(text.strip("'\" "))))
    if len(shapes) > 1 and not {"image_size", "num_frames"} <= keys:
        raise ConfigError([f"run={','.join(weights)}: of several sizes; give image_size= and num_frames="])
    for _, frames, height, width in shapes - {None}:
        sizes = {"image_size": f"[{height},{width}]", "num_frames": f"{frames}"}
        found += [f"{key}={value}" for key, value in sizes.items() if key not in keys]
    return found


if __name__ == "__main__":
    sys.exit(main())
