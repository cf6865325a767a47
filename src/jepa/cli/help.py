"""The text of `jepa-train --help`, made from the comments in the configuration files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from textwrap import fill

import yaml

from jepa.config.catalogue import GLOBAL_GROUPS, Catalogue, Choice, conf_folder
from jepa.config.schema import show_value

HEAD = """\
jepa-train trains a joint embedding predictive architecture and judges it while it trains.

usage: jepa-train [key=value ...] [group=choice ...] [flags]

  jepa-train                                            the defaults below, on pictures drawn on the fly
  jepa-train experiment=quickstart                      a small model in a few minutes
  jepa-train dataset=imagefolder dataset.root_path=./data dataset.image_folder=train epochs=100
  jepa-train encoder=temporal mask=temporal dataset=moving_digits   clips: predict the future from the past
  jepa-train size=small image_size=96 encoder.patch_size=8 mask=random mask.ratio=0.6
  jepa-train --multirun mask=block,random lr=1e-4,3e-4  every combination, one after the other
  jepa-train --multirun sweep=lr experiment=quickstart  the combinations of a file
  jepa-train --multirun hydra/launcher=local ...        two at a time; hydra.launcher.n_jobs=4: four
  jepa-train --multirun hydra/launcher=slurm hydra.launcher.partition=gpu ...   each as a job of a Slurm cluster

jepa-finetune, jepa-eval, jepa-export --help: afterwards;  jepa-compare --help: methods side by side in one table;
jepa-find --help: a learning rate, the fastest micro-batch"""
FLAGS = """\
  -m, --multirun          run every combination of values given as key=a,b
  --config-dir FOLDER     a folder with groups of your own, as FOLDER/mask/mine.yaml
  --config-name NAME      start from NAME.yaml instead of train.yaml
  --cfg job               show the configuration instead of running it
  -sc install=bash        completion: eval "$(jepa-train -sc install=bash)"; also zsh and fish
  -h, --help              this text, with the groups of --config-dir"""


def help_text(arguments: Sequence[str] = (), name: str = "train", head: str = HEAD, flags: str = FLAGS) -> str:
    """Keys, groups and flags, with the groups of a folder given by --config-dir; of conf/NAME.yaml."""
    conf = conf_folder()
    added = _value_of("--config-dir", arguments)
    groups = Catalogue([conf, *([Path(added)] if added else [])]).groups
    primary = conf / f"{name}.yaml"
    lines = [head, "", "keys, with their defaults", *_keys(primary.read_text())]
    lines += ["", "groups, their default marked with * and its keys below"]
    for group, default in _defaults(primary):
        lines += _group(group, default, groups.pop(group, {}))
    for group in sorted(groups) if name == "train" else ():
        lines += _group(group, [], groups[group])
    return "\n".join([*lines, "", "flags", flags])


def _value_of(flag: str, arguments: Sequence[str]) -> str | None:
    for position, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name == flag:
            return value or next(iter(arguments[position + 1 :]), None)
    return None


def _keys(text: str) -> Iterator[str]:
    """`key: default  # meaning` of the file, with its section in front."""
    section = ""
    for indent, key, value, meaning in re.findall(r"^( *)(\w+):(?: +(.*?))?(?: +# (.*))?$", text, re.MULTILINE):
        section = section if indent else f"{key}."
        if meaning:
            default = re.sub(r"\$\{choice:(\w+)\}", r"\1", value)
            yield f"  {(section if indent else '') + key + '=' + default:<36} {meaning}"


def _defaults(primary: Path) -> Iterator[tuple[str, list[str]]]:
    for entry in yaml.safe_load(primary.read_text())["defaults"]:
        for group, choice in entry.items() if isinstance(entry, dict) else ():
            yield group.removeprefix("override "), choice if isinstance(choice, list) else [choice]


def _group(group: str, default: list[str], choices: dict[str, Choice]) -> Iterator[str]:
    yield f"  {group}="
    for name, choice in choices.items():
        yield f"   {'*' if name in default else ' '} {name:<18} {choice.comment}".rstrip()
    shown = (choices[name] for name in default if name in choices)
    values = {key: value for choice in shown for key, value in choice.values.items() if "_target_" not in key}
    if values and group not in GLOBAL_GROUPS:
        listed = "  ".join(f"{key}={show_value(value)}" for key, value in values.items())
        yield fill(listed, 116, initial_indent="       ", subsequent_indent="       ", break_on_hyphens=False)
