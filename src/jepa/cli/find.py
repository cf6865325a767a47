"""jepa-find: finds a learning rate, or the micro-batch that is fastest here, for what jepa-train would run."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from jepa.cli.terminal import outcome, quick_imports
from jepa.errors import ConfigError

EPILOG = """\
examples
  jepa-find lr experiment=quickstart        a range test: lr grows while the loss and the spread of features are watched
  jepa-find batch dataset=cifar10 size=small batch_size=1024
  jepa-find batch experiment=quickstart --largest

The run of that name stays as it is; find.html and find.json lie in outputs/NAME-find-lr and outputs/NAME-find-batch."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0, 1 where nothing was found, 2 for what is refused, 130 after Ctrl-C."""
    flags = _parser().parse_intermixed_args(arguments)
    return outcome("jepa-find", lambda: _find(flags))


def _find(flags: argparse.Namespace) -> int:
    from jepa.config import compose

    if flags.steps < 10 or not 0 < flags.low < flags.high:
        given = f"--steps {flags.steps} --low {flags.low:g} --high {flags.high:g}"
        raise ConfigError([f"{given}: needs 10 steps or more and 0 < low < high"])
    config = compose(flags.overrides, flags.config_dir)
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    with quick_imports():
        from jepa.training.find_batch import find_batch
        from jepa.training.find_lr import find_lr

    if flags.what == "batch":
        return find_batch(config, flags.overrides, largest=flags.largest)
    return find_lr(config, flags.overrides, num_steps=flags.steps, low=flags.low, high=flags.high)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "jepa-find", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("lr", "batch"), help="what to find")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="overrides as of jepa-train")
    parser.add_argument("--steps", type=int, default=150, metavar="N", help="lr: of the range test (150)")
    parser.add_argument("--low", type=float, default=1e-6, metavar="LR", help="lr: the first one (1e-6)")
    parser.add_argument("--high", type=float, default=1.0, metavar="LR", help="lr: the last one (1)")
    parser.add_argument("--largest", action="store_true", help="batch: also the largest batch that fits")
    parser.add_argument("--config-dir", metavar="FOLDER", help="a folder with groups of your own")
    return parser


if __name__ == "__main__":
    sys.exit(main())
