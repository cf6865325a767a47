"""Learning-rate range test (Smith 2017, section 3.3), for losses that are also low when the features collapse."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from markupsafe import Markup

from jepa.config import TrainConfig
from jepa.errors import RunError, as_config_errors
from jepa.parallel.session import open_session
from jepa.reports.charts import Chart, Line, ReferenceLine, line_chart
from jepa.reports.page import Table, render
from jepa.runs.metrics import write_atomically
from jepa.training.assemble import make_components, make_dataset, make_plan, split_phases, start_batches
from jepa.training.loop import Plan, TrainComponents, one_step
from jepa.types import LossOutput, RawBatch

SMOOTHING = 0.85
"""Weight of the past in the exponential means of loss and spread."""
COLLAPSED = 0.5
"""Fraction of the initial spread below which the features count as collapsed."""
RISE = 0.1
"""Fraction of the decrease of the loss by which it must rise again to count as turned."""
SETTLED = 0.9
"""Fraction of the decrease of the loss after which it counts as settled."""
LIMITS = {
    "collapse": (1.0, "the spread of the features falls below half at lr {:.2g}"),
    "settled": (1.0, "the loss has done nine tenths of its fall at lr {:.2g}"),
    "turn": (0.1, "the loss turns up at lr {:.2g}, and a tenth of that is safe"),
    "end": (0.1, "the last lr with a finite loss is {:.2g}, and a tenth of that is safe"),
}
"""Event -> fraction of its learning rate that suits a whole run (empirical), and the reason to print."""
INTERRUPTED = 130
"""Exit status after Ctrl-C."""
ROWS = 12
"""Number of rows in the printed table."""


class Point(NamedTuple):
    lr: float
    loss: float
    spread: float
    """Standard deviation of the embedding over the batch, mean over its dimensions."""


class ChosenRate(NamedTuple):
    lr: float
    reason: str
    limits: dict[str, float]
    """Event -> learning rate at which it happens."""


def ramp(plan: Plan, components: TrainComponents, batches: Iterator[RawBatch], lrs: Sequence[float]) -> Iterator[Point]:
    """Train with growing learning rates, until the loss is not finite; the model must not be used afterwards."""
    weight_decay, spreads = components.schedule.weight_decay_at(0), []
    schedule = SimpleNamespace(lr_at=lrs.__getitem__, weight_decay_at=lambda step: weight_decay)
    components = replace(components, schedule=schedule, guard=None)

    def record_spread(module: object, arguments: object, output: LossOutput) -> None:
        spreads.append(output.embedding.float().std(0).mean())

    components.objective.register_forward_hook(record_spread)
    for step, lr in enumerate(lrs):
        spreads.clear()
        output, _ = one_step(plan, components, next(batches), step)
        loss, spread = torch.stack([output.loss.float(), torch.stack(spreads).mean()]).tolist()
        if not math.isfinite(loss):
            return
        yield Point(lr, loss, spread)


def choose(points: Sequence[Point]) -> ChosenRate | None:
    """The smallest safe learning rate; None if there are too few points or the loss did not fall."""
    if len(points) < 10:
        return None
    lrs = [point.lr for point in points]
    loss, spread = (smooth(values) for values in zip(*(point[1:] for point in points), strict=True))
    first = max(1, len(points) // 10)
    initial_loss, initial_spread = sum(loss[:first]) / first, sum(spread[:first]) / first
    fall = initial_loss - min(loss)
    if fall <= max(loss[:first]) - min(loss[:first]):
        return None
    settled = next(i for i, value in enumerate(loss) if initial_loss - value >= SETTLED * fall)
    limits = {"settled": lrs[settled], "end": lrs[-1]}
    collapsed = next((i for i, value in enumerate(spread) if value < COLLAPSED * initial_spread), None)
    turned = next((i for i in range(len(loss)) if loss[i] - min(loss[: i + 1]) > RISE * fall), None)
    limits |= {name: lrs[i] for name, i in (("collapse", collapsed), ("turn", turned)) if i is not None}
    name = min(limits, key=lambda name: LIMITS[name][0] * limits[name])
    safety, reason = LIMITS[name]
    return ChosenRate(float(f"{safety * limits[name]:.1e}"), reason.format(limits[name]), limits)


def smooth(values: Sequence[float]) -> list[float]:
    """Exponential mean without the bias of its start."""
    mean, weight, means = 0.0, 0.0, []
    for value in values:
        mean, weight = SMOOTHING * mean + (1 - SMOOTHING) * value, SMOOTHING * weight + 1 - SMOOTHING
        means.append(mean / weight)
    return means


@contextmanager
def prepare(config: TrainConfig) -> Iterator[tuple[Plan, TrainComponents, Iterator[RawBatch], int]]:
    """Plan, a new model and batches of the first phase, and the size of the data set. Raises ConfigError."""
    with as_config_errors():
        config = replace(config, compile=False)
        dataset = make_dataset(config)
        phase = split_phases(config, len(dataset))[0]
        dataset = dataset if phase.config.num_frames == config.num_frames else make_dataset(phase.config)
        session = open_session(device=config.device, precision=config.precision)
        plan = make_plan(phase, len(dataset))
        components = make_components(phase.config, dataset, plan, session)
        stream = start_batches(phase.config, dataset, plan, components, first_step=0)
    with closing(stream):
        yield plan, components, stream, len(dataset)


def find_lr(config: TrainConfig, overrides: Sequence[str], *, num_steps: int, low: float, high: float) -> int:
    """Print a table and the choice, write find.html and find.json; returns the exit status."""
    points: list[Point] = []
    lrs = [low * (high / low) ** (step / (num_steps - 1)) for step in range(num_steps)]
    with prepare(config) as (plan, components, stream, _):
        stopped = collect(ramp(plan, components, stream, lrs), points)
    sample = points[:: max(1, len(points) // ROWS)]
    rows = [[f"{point.lr:.1e}", f"{point.loss:.4g}", f"{point.spread:.4g}"] for point in sample]
    print(Table(heads=["lr", "loss", "spread"], rows=rows).terminal(10), flush=True)
    choice = choose(points)
    result = {"points": [point._asdict() for point in points], "found": choice and choice._asdict()}
    lines = [f"no lr found in {len(points)} steps: the loss did not fall"]
    if choice:
        lines = [f"lr={choice.lr:g}: {choice.reason}", rerun_command(overrides, lr=f"{choice.lr:g}")]
    folder = write_result(config, "lr", result, charts=draw_charts(points, choice.lr if choice else None), lines=lines)
    if stopped and choice is None:
        raise KeyboardInterrupt
    if choice is None:
        raise RunError(f"{lines[0]}; see {folder}/find.html")
    print("\n".join([*lines, f"chart: {folder}/find.html"]))
    return INTERRUPTED if stopped else 0


def draw_charts(points: Sequence[Point], lr: float | None) -> list[Markup]:
    """Loss and spread over the logarithm of the learning rate."""
    if not points:
        return []
    mark = ReferenceLine(name=f"chosen: lr={lr:g}", value=math.log10(lr)) if lr else None
    hint = "The vertical line is the chosen lr." if lr else ""
    charts = []
    for title, column in (("Loss, smoothed", 1), ("Spread of the features, smoothed", 2)):
        values = smooth([point[column] for point in points])
        curve = [(math.log10(point.lr), value) for point, value in zip(points, values, strict=True)]
        chart = Chart(title=title, axis="lr", hint=hint, log_if_wide=True, has_powers=True, mark=mark)
        charts.append(line_chart(chart, [Line(name="last value", points=curve)]))
    return charts


def collect(stream: Iterator, items: list, row_text: Callable[[Any], str] | None = None) -> bool:
    """Append the items of the stream, and print the row of each; returns True if Ctrl-C ended it."""
    try:
        for item in stream:
            items.append(item)
            if row_text:
                print(row_text(item), flush=True)
    except KeyboardInterrupt:
        print("interrupted; the result so far:", flush=True)
        return True
    return False


def rerun_command(overrides: Sequence[str], **changes: str) -> str:
    """The command of jepa-train with these overrides, some of them changed."""
    unchanged = [text for text in overrides if text.lstrip("+").partition("=")[0] not in changes]
    return "  " + shlex.join(["jepa-train", *unchanged, *(f"{key}={value}" for key, value in changes.items())])


def write_result(
    config: TrainConfig, what: str, result: dict, *, charts: Sequence[Markup] = (), table: Table | None = None,
    lines: Sequence[str] = (),
) -> Path:  # fmt: skip
    folder = Path("outputs") / f"{config.name}-find-{what}"
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "find.json", json.dumps(result, indent=1))
    name = f"{config.name}: {'learning rate' if what == 'lr' else 'batch size'}"
    tone = "good" if result.get("found") else "wait"
    page = render("find.html", name=name, charts=charts, table=table, lines=lines, tone=tone)
    write_atomically(folder / "find.html", page)
    return folder
