"""The texts of --help, built from the comments in the configuration files."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from textwrap import fill

import yaml

from jepa.cli.answers import FLAGS
from jepa.config.catalogue import EXPERIMENTS, GLOBAL_GROUPS, Catalogue, Choice, conf_folder
from jepa.config.schema import show_value

HEAD = """\
jepa-train trains a joint embedding predictive architecture and evaluates it during training.

usage: jepa-train [key=value ...] [group=choice ...] [flags]

  jepa-train                                            the defaults below, on generated images of shapes
  jepa-train experiment=quickstart                      a small model in a few minutes
  jepa-train experiment=small_folder dataset.root_path=./data   your own images: folders of classes, or all in one
  jepa-train encoder=temporal mask=temporal dataset=moving_digits   clips: predict the future from the past
  jepa-train size=small image_size=96 encoder.patch_size=8 mask=random mask.ratio=0.6
  jepa-train --multirun mask=block,random lr=1e-4,3e-4  every combination, one after the other
  jepa-train --multirun sweep=lr experiment=quickstart  the combinations listed in conf/sweep/lr.yaml
  jepa-train --multirun hydra/launcher=local ...        two at a time; four with hydra.launcher.n_jobs=4
  jepa-train --multirun hydra/launcher=slurm hydra.launcher.partition=gpu ...   each as a Slurm job

afterwards: jepa-finetune, jepa-eval, jepa-embed, jepa-predict, jepa-export; several methods: jepa-compare; tuning:
jepa-find (each has --help)"""
INDENT = " " * 7
TRAIN_FLAGS = """\
  -m, --multirun          run every combination of the values of key=a,b
  --config-name NAME      start from NAME.yaml instead of train.yaml
"""


def help_text(arguments: Sequence[str] = (), name: str = "train", head: str = HEAD, flags: str = "") -> str:
    """Keys, groups and flags of conf/NAME.yaml, including the groups of a --config-dir in `arguments`.

    Of the choices that are typed in `arguments`, or made by a typed experiment, every key has a line with its comment.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", nargs=1, default=[], type=Path)
    groups = Catalogue([conf_folder(), *parser.parse_known_args(arguments)[0].config_dir]).groups
    primary = conf_folder() / f"{name}.yaml"
    lines = [head, "", "keys, with their defaults", *key_lines(primary.read_text(encoding="utf-8"))]
    typed = _typed_choices(arguments, groups)
    lines += ["", "groups: the choices that are made are marked with *, their keys are below"]
    for group, default in _defaults(primary):
        lines += _group(default, groups.pop(group, {}), typed.get(group), group)
    for group in sorted(groups) if name == "train" else (group for group in typed if group in groups):
        lines += _group([], groups[group], typed.get(group), group)
    flags = flags or TRAIN_FLAGS + FLAGS.format(program=f"jepa-{name}", group="mask")
    return "\n".join([*lines, "", "flags", flags])


def print_help(arguments: Sequence[str], name: str = "train", head: str = HEAD, flags: str = "") -> int:
    """Print `help_text`; returns exit status 0."""
    with suppress(BrokenPipeError):  # the reader of the pipe, such as `head`, has closed it
        print(help_text(arguments, name, head, flags), flush=True)
    return 0


def key_lines(text: str, width: int = 36) -> Iterator[str]:
    """SECTION.KEY=DEFAULT in a column of `width` characters and its comment, for each commented key of a YAML text."""
    section = ""
    for indent, key, value, meaning in re.findall(r"^( *)(\w+):(?: +(.*?))?(?: +# (.*))?$", text, re.MULTILINE):
        section = section if indent else f"{key}."
        if meaning:
            default = re.sub(r"\$\{choice:(\w+)\}", r"\1", value)
            yield f"  {(section if indent else '') + key + '=' + default:<{width}} {meaning}"


def _defaults(primary: Path) -> Iterator[tuple[str, list[str]]]:
    """Each group in the defaults list of a configuration, with its default choices."""
    for entry in yaml.safe_load(primary.read_text(encoding="utf-8"))["defaults"]:
        for group, choice in entry.items() if isinstance(entry, dict) else ():
            yield group.removeprefix("override "), choice if isinstance(choice, list) else [choice]


def _typed_choices(arguments: Sequence[str], groups: dict[str, dict[str, Choice]]) -> dict[str, list[str]]:
    """Group -> existing choices that arguments as mask=tube make, or the experiments among them."""
    typed: dict[str, list[str]] = {}
    for group, _, value in (text.lstrip("+").partition("=") for text in arguments if not text.startswith("-")):
        names = [name for name in re.findall(r"\w+", value) if name in groups.get(group, {})]
        for experiment in (groups[group][name] for name in names if group in EXPERIMENTS):
            for other, name in re.findall(r"^ *- override /?([\w/]+): *(\w+)", experiment.text, re.MULTILINE):
                typed.setdefault(other, [name] * (name in groups.get(other, {})))
        typed |= {group: names} if names else {}
    return typed


def _group(default: list[str], choices: dict[str, Choice], typed: list[str] | None, group: str) -> Iterator[str]:
    """The choices of a group with their comments, and the keys of those that are typed, or else of the default ones."""
    made = default if typed is None else typed
    yield f"  {group}="
    for name, choice in choices.items():
        yield f"   {'*' if name in made else ' '} {name:<18} {choice.comment}".rstrip()
    selected = [choices[name] for name in made if name in choices]
    if typed is not None:
        yield from (line for choice in selected for line in _commented_keys(choice))
    elif group not in GLOBAL_GROUPS:
        values = {key: value for choice in selected for key, value in choice.values.items() if "_target_" not in key}
        keys = "  ".join(f"{key}={show_value(value)}" for key, value in values.items())
        yield from [fill(keys, 116, initial_indent=INDENT, subsequent_indent=INDENT, break_on_hyphens=False)] * bool(
            keys
        )


def _commented_keys(choice: Choice) -> Iterator[str]:
    """KEY=VALUE of each key that a file sets, with the comment that stands beside it."""
    for key, value in choice.values.items():
        if "_target_" not in key:
            yield f"{INDENT}{f'{key}={show_value(value)}':<34} {choice.comments.get(key, '')}".rstrip()
