"""What a run says on the console: a header, a row for each evaluation, and what to do next. Without torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from shlex import quote
from typing import Any

from jepa.config import checkpoints
from jepa.config.heads import head_of
from jepa.reports.run_table import Column, table_columns, table_rows
from jepa.reports.verdict import Rows, collapse_alarm, series, verdict
from jepa.runs.metrics import is_finished

LABEL = 8
"""Width of the labels of the header."""
EARLY_SHARE = 0.25
"""Share of a run in which its probes may still fall below those of step 0."""
RISE = 1.1
"""Factor above its lowest value from which the training loss counts as rising."""
MIN_LOSSES = 4
"""Logged losses before anything is said of them."""
FOLDERS = {"ImageFolder": "images", "VideoFolder": "videos"}
"""Data set of files -> the key of jepa-embed and jepa-predict for such files."""
REPLAY = "replay"
"""Folder of the episodes of a run of jepa-rl, beside that of its world."""


def header_line(label: str, text: str) -> str:
    return f"{label:<{LABEL}}{text}"


def opening_lines(config: Mapping[str, Any], folder: Path) -> list[str]:
    """Lines of what is known before torch is imported: what is trained, where the report is, what Ctrl-C does.

    None for a run that is finished and has nothing to do.
    """
    if is_finished(folder, config):
        return []
    names = {group: _class_name(config[group]) for group in ("objective", "encoder", "dataset")}
    lines = [
        header_line("run", f"{folder}: {names['objective']} with {names['encoder']} on {names['dataset']}"),
        header_line("report", f"{folder / 'report.html'}, written at each evaluation"),
        header_line("Ctrl-C", "saves after the step and stops; the same command goes on; a second one stops at once"),
    ]
    return [f"{line}\n" for line in lines]


def _class_name(node: Mapping[str, Any]) -> str:
    return str(node.get("_target_", "none")).rpartition(".")[2]


def evaluation_rows(rows: Rows, step: int, total_steps: int, initial: str, *, with_head: bool) -> list[str]:
    """The row of an evaluation: step, probes, rank and what they say so far; at step 0 also the row of raw pixels."""
    columns = table_columns(rows)
    widths = [max(len(column.head), 7) for column in columns]
    values = [dict(series(rows, column.metric)).get(step) for column in columns]
    lines = [_row("step", [column.head for column in columns], widths, "so far")] if with_head else []
    comment = f"{initial} encoder: what training must beat" if step == 0 else _comment(rows, step, total_steps, initial)
    lines.append(_row(f"{step:,}", list(map(Column.cell, columns, values)), widths, comment))
    pixels = dict(table_rows(rows, initial)).get("raw pixels") if step == 0 else None
    if pixels and any(value is not None for value in pixels):
        lines.append(_row("-", list(map(Column.cell, columns, pixels)), widths, "raw pixels: to beat as well"))
    return lines


def _row(step: str, cells: list[str], widths: list[int], comment: str) -> str:
    return "  ".join([f"{step:>9}", *(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)), comment])


def _comment(rows: Rows, step: int, total_steps: int, initial: str) -> str:
    """The verdict so far in a word, and what is normal now."""
    word = verdict(rows, initial).word
    if collapse_alarm(rows) or step >= total_steps:
        return word
    losses = [loss for _, loss in series(rows, "train/loss")]
    notes = []
    if len(losses) >= MIN_LOSSES and losses[-1] > RISE * min(losses) and series(rows, "train/momentum"):
        notes.append("the loss rises while the targets grow richer, which is normal")
    if word != "learning" and step <= EARLY_SHARE * total_steps:
        notes.append("early: probes often dip before they rise")
    return f"{word}: {'; '.join(notes)}" if notes else word


def next_commands(config: Mapping[str, Any], folder: Path) -> list[tuple[str, str]]:
    """Commands that fit a finished run, each with what it does: look, own data, use it."""
    inside = quote(str(folder))
    run = f"run={inside}"
    objective, dataset = (_class_name(config.get(group) or {}) for group in ("objective", "dataset"))
    files = FOLDERS.get(dataset, "videos" if config.get("num_frames", 1) > 1 else "images")
    source = f"{files}={quote(_data_folder(config))}"
    if objective == "IRIS":
        return []
    if objective == "Dynamics":
        return _commands_of_world(config["objective"].get("heads") or (), folder)
    if head_of(dict(config)):
        return [
            (
                f"jepa-predict {run} {source} out={inside}/predictions.csv draw={inside}/drawn",
                "answers for files, also as pictures",
            ),
            (f"jepa-embed {run} {source} out={inside}/features.npz", "its features of files"),
            (f"jepa-export {run} format=safetensors", "the encoder for other programs"),
        ]
    tune = f"jepa-finetune {run} name={quote(f'{folder.name}-tuned')}"
    if (batch_size := config.get("batch_size", 64)) < 64:
        tune += f" batch_size={batch_size}"  # the default may be more than there are samples
    own = "experiment=small_folder dataset.root_path=./data name=mine"
    is_own = dataset in FOLDERS
    return [
        (f"jepa-eval {run} task=inspect", "look: attention, feature maps, neighbours, mistakes"),
        (tune, "train it on the labels of its data")
        if is_own or files == "videos"
        else (f"jepa-train {own}", "train on your own pictures, in ./data/train"),
        (f"jepa-embed {run} {source} out={inside}/features.npz", "use it: features of files"),
    ]


def _commands_of_world(heads: Collection[str], folder: Path) -> list[tuple[str, str]]:
    """Those that its heads and the actions of its environment allow; none for the world of a run of jepa-rl."""
    if (folder.parent / REPLAY).is_dir():
        return []
    place = checkpoints.locate(folder)
    world = (checkpoints.quiet_state(place).get("world") if place else None) or {}
    run = f"run={quote(str(folder))}"
    plan, commands = f"jepa-plan {run}", []
    if not world.get("env"):  # of recordings
        heads = ()
    if "value" in heads or "metric" in heads:
        commands.append((plan, "reach goals with this world model"))
        if not world.get("num_actions"):
            cost = "" if "value" in heads else " cost=metric_distance"
            commands.append((f"{plan} planner=icem{cost} name={quote(folder.name)}-icem", "with another planner"))
        elif "policy" in heads:
            commands.append((f"{plan} planner=policy name={quote(folder.name)}-policy", "without a search"))
    elif costs := [name for name in ("return", "reward") if name in heads]:
        commands.append((f"{plan} cost={costs[0]}", "earn rewards with this world model"))
    return [*commands, (f"jepa-export {run} format=safetensors", "the encoder for other programs")]


def _data_folder(config: Mapping[str, Any]) -> str:
    """The folder of the files that the run was trained on; ./data for data sets that are no files."""
    dataset = config.get("dataset") or {}
    part = dataset.get("image_folder") or dataset.get("video_folder")
    root = dataset.get("root_path") or "./data"
    return str(Path(root) / part) if part else "./data"


def closing_lines(config: Mapping[str, Any], folder: Path) -> list[str]:
    """What to do next, a line for each command; none if nothing fits."""
    commands = next_commands(config, folder)
    width = max((len(command) for command, _ in commands), default=0)
    return ["next:"] * bool(commands) + [*(f"  {command:<{width}}  # {purpose}" for command, purpose in commands)]
