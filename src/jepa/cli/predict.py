"""jepa-predict: the classes or boxes that a fine-tuned run finds in files."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jepa.cli.overrides import run_overrides
from jepa.cli.terminal import quick_imports, setup_logging

HEAD = """\
jepa-predict writes what a run of jepa-finetune says of files: classes with probabilities, or boxes with scores.

usage: jepa-predict run=RUN images=FOLDER [out=FILE.csv] [key=value ...] [flags]

  jepa-predict run=outputs/tuned images=photos out=predictions.csv top=3
  jepa-predict run=outputs/tuned videos=clips
  jepa-predict run=outputs/boxes images=photos min_score=0.3 draw=drawn    boxes, also drawn into the pictures

The table names classes as the labels did. Boxes are in pixels of the pictures, upright by their EXIF tag. A file that
cannot be read has a row with the reason."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 if it failed, 2 for an error in the arguments, 130 after Ctrl-C."""
    return run_overrides("predict", _predict, arguments, head=HEAD, stopped="stopped; no table was written")


def _predict(overrides: Sequence[str], config_dir: str | None) -> int:
    from jepa.config import compose_predict

    config = compose_predict(overrides, config_dir)
    setup_logging()
    with quick_imports(config):
        from jepa.inference.predict import predict

    print(predict(config), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
