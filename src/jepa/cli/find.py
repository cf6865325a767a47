"""jepa-find: finds a learning rate, or the fastest micro-batch on this machine, for a run of jepa-train."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence

from jepa.cli.answers import add_flags, answer
from jepa.cli.terminal import quick_imports, run_command, setup_logging
from jepa.errors import ConfigError

EPILOG = """\
examples
  jepa-find lr experiment=quickstart        a range test: loss and spread of features while lr grows
  jepa-find batch dataset=cifar10 size=small batch_size=1024
  jepa-find batch experiment=quickstart --largest

Writes find.html and find.json into outputs/NAME-find-lr or outputs/NAME-find-batch; the run NAME is not changed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 if nothing was found, 2 for an error in the arguments, 130 after Ctrl-C."""
    parser = ArgumentParser("jepa-find", None, __doc__, EPILOG, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("lr", "batch"), help="what to find")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="overrides, as for jepa-train")
    parser.add_argument("--steps", type=int, default=150, metavar="N", help="lr: steps of the range test (150)")
    parser.add_argument("--low", type=float, default=1e-6, metavar="LR", help="lr: first learning rate (1e-6)")
    parser.add_argument("--high", type=float, default=1.0, metavar="LR", help="lr: last learning rate (1)")
    parser.add_argument("--largest", action="store_true", help="batch: also find the largest batch that fits")
    add_flags(parser)
    given = list(sys.argv[1:] if arguments is None else arguments)

    def command() -> int:
        status = answer("jepa-find", "train", given)
        return _find(parser.parse_intermixed_args(given)) if status is None else status

    return run_command("jepa-find", command)


def _find(flags: Namespace) -> int:
    from jepa.config import compose

    if flags.steps < 10 or not 0 < flags.low < flags.high:
        values = f"--steps {flags.steps} --low {flags.low:g} --high {flags.high:g}"
        raise ConfigError([f"{values}: needs 10 steps or more and 0 < low < high"])
    config = compose(flags.overrides, flags.config_dir)
    typed = [*(["--config-dir", flags.config_dir] if flags.config_dir else []), *flags.overrides]
    setup_logging()
    if config.estimate:
        with quick_imports():
            from jepa.resources.estimate import print_estimates

        return print_estimates({"": config})
    with quick_imports(config):
        from jepa.training.find_batch import find_batch
        from jepa.training.find_lr import find_lr

    if flags.what == "batch":
        return find_batch(config, typed, largest=flags.largest)
    return find_lr(config, typed, num_steps=flags.steps, low=flags.low, high=flags.high)


if __name__ == "__main__":
    sys.exit(main())
