"""jepa-finetune: jepa-train on labels, starting from the weights of an encoder; same loop, checkpoints and reports."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jepa.cli.help import print_help
from jepa.cli.overrides import with_run
from jepa.cli.terminal import STOPPED_AT_ONCE, report_error, run_command
from jepa.cli.train import main as train
from jepa.config.finetuning import to_train_arguments
from jepa.errors import ConfigError

HEAD = """\
jepa-finetune trains an encoder and a head on labels and evaluates them on the held-out part of the data set.

usage: jepa-finetune run=WEIGHTS [key=value ...] [group=choice ...] [flags]

  jepa-finetune run=outputs/quickstart                  on the data of the run, here the generated shapes
  jepa-finetune run=outputs/cats dataset=imagefolder dataset.root_path=./data epochs=50 name=cats-tuned
  jepa-finetune run=outputs/cats objective.freeze=true lr=2e-2 ...   the head alone, at a higher rate
  jepa-finetune run=outputs/cats encoder.fresh=true ...              the same encoder without its weights
  jepa-finetune run=timm:vit_small_patch16_224.dino image_size=96 ...
  jepa-finetune run=outputs/cells objective=detect dataset=voc dataset.root_path=./voc      boxes

run=WEIGHTS is short for encoder.weights=WEIGHTS: a run or checkpoint, an exported folder, published weights, timm:NAME.
image_size and num_frames default to the values that a run, an exported folder or a folder of transformers was trained
with. Without dataset= the data are those of the run, and augment.flip=false is taken over from it too: where left and
right are labels, a mirrored sample has another one. Everything else is as in jepa-train --help; the defaults that
differ are below."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status, as for jepa-train."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    return run_command("jepa-finetune", lambda: _finetune(arguments), stopped=STOPPED_AT_ONCE)


def _finetune(arguments: Sequence[str]) -> int:
    if {"--help", "-h"} & set(arguments):
        return print_help(arguments, "finetune", HEAD)
    arguments = with_run(arguments)
    primary = [] if {"--config-name", "-cn"} & set(arguments) else ["--config-name", "finetune"]
    try:
        return train([*primary, *to_train_arguments(arguments)])
    except ConfigError as error:
        return report_error(error)


if __name__ == "__main__":
    sys.exit(main())
