"""jepa-eval: evaluates representations by probes, few-shot and fine-tuning, with baselines and the protocol."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jepa.cli.overrides import run_overrides
from jepa.cli.terminal import quick_imports, setup_logging

HEAD = """\
jepa-eval evaluates representations on one data set: a table with intervals, baselines and the protocol.

usage: jepa-eval run=SOURCE [task=TASK] [dataset=CHOICE] [key=value ...] [flags]

  jepa-eval run=outputs/x                                 on the data of the run: kNN and linear probe
  jepa-eval run=outputs/x dataset=cifar10                 kNN and linear probe, with raw pixels, HOG and fresh weights
  jepa-eval run=[outputs/x,outputs/y] task=[knn,linear,attentive,finetune] dataset=cifar10 train_samples=10000
  jepa-eval run=outputs/x dataset=cifar10 shots=0.01 seeds=5    few-shot; shots=10: ten images of each class
  jepa-eval run=outputs/x task=linear solver=sgd layers=4 dataset=imagefolder dataset.root_path=./data
  jepa-eval run=timm:vit_small_patch16_224 floors=[] dataset=cifar10
  jepa-eval run=outputs/x task=inspect dataset=cifar10    a page: feature maps, attention, neighbours, mistakes

run: a run folder or checkpoint of jepa-train, an exported folder, published I-JEPA and V-JEPA files, a folder of
transformers, timm:NAME, hf:ORG/NAME; or pixels, hog, dictionary, untrained. The result is eval.json, .md and .html in
outputs/NAME; the same command again repeats nothing that is done. Hyper-parameters are chosen on training samples."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 if it failed, 2 for an error in the arguments, 130 after Ctrl-C."""
    return run_overrides("eval", _evaluate, arguments, head=HEAD)


def _evaluate(overrides: Sequence[str], config_dir: str | None) -> int:
    from jepa.config import compose_eval

    config = compose_eval(overrides, config_dir)
    setup_logging()
    with quick_imports(config):
        from jepa.benchmark.protocol import evaluate

    evaluate(config)
    return 0


if __name__ == "__main__":
    sys.exit(main())
