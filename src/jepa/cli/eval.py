"""jepa-eval: judges representations by probes, few-shot or fine-tuned, with floors and the protocol beside."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from contextlib import suppress

from jepa.cli.terminal import outcome, quick_imports

HEAD = """\
jepa-eval judges representations on one data set: a table with intervals, floors beside it, and the protocol.

usage: jepa-eval run=SOURCE [task=TASK] [dataset=CHOICE] [key=value ...] [flags]

  jepa-eval run=outputs/x dataset=cifar10                 kNN and linear probe, with raw pixels, HOG and fresh weights
  jepa-eval run=[outputs/x,outputs/y] task=[knn,linear,attentive,finetune] dataset=cifar10 train_samples=10000
  jepa-eval run=outputs/x dataset=cifar10 shots=0.01 seeds=5    few-shot; shots=10: ten images of each class
  jepa-eval run=outputs/x task=linear solver=sgd layers=4 dataset=imagefolder dataset.root_path=./data
  jepa-eval run=timm:vit_small_patch16_224 floors=[] dataset=cifar10
  jepa-eval run=outputs/x task=inspect dataset=cifar10    a page: feature maps, attention, neighbours, mistakes

run: a run folder or checkpoint of jepa-train, an exported folder, published I-JEPA and V-JEPA files, a folder of
transformers, timm:NAME, hf:ORG/NAME; or pixels, hog, untrained. The result is eval.json, .md and .html in outputs/NAME;
the same command again repeats nothing that is done. Hyper-parameters are chosen on training samples alone."""
FLAGS = """\
  --config-dir FOLDER     a folder with groups of your own, as FOLDER/dataset/mine.yaml
  -h, --help              this text, with the groups of --config-dir"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0, 1 where it failed, 2 for what is refused, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser("jepa-eval", add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--config-dir")
    parser.add_argument("-h", "--help", action="store_true")
    flags = parser.parse_intermixed_args(arguments)
    if flags.help:
        from jepa.cli.help import help_text

        with suppress(BrokenPipeError):  # a pager or `head` that has seen enough
            given = ["--config-dir", flags.config_dir] if flags.config_dir else []
            print(help_text(given, "eval", HEAD, FLAGS), flush=True)
        return 0
    goes_on = "stopped; the same command again goes on from there"
    return outcome("jepa-eval", lambda: _evaluate(flags.overrides, flags.config_dir), stopped=goes_on)


def _evaluate(overrides: Sequence[str], config_dir: str | None) -> int:
    from jepa.config import compose_eval

    config = compose_eval(overrides, config_dir)
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    with quick_imports():
        from jepa.benchmark.protocol import evaluate

    evaluate(config)
    return 0


if __name__ == "__main__":
    sys.exit(main())
