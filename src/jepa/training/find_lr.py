"""Learning-rate range test (Smith 2017, section 3.3), for losses that are also low where the features collapse."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from markupsafe import Markup

from jepa.config import TrainConfig
from jepa.errors import RunError, as_config_errors
from jepa.parallel.session import open_session
from jepa.reports.charts import Chart, Line, line_chart
from jepa.reports.page import Table, render
from jepa.runs.metrics import write_atomically
from jepa.schedules import Schedule
from jepa.training.assemble import make_components, make_dataset, make_plan, split_phases, start_batches
from jepa.training.loop import Plan, TrainComponents, one_step
from jepa.types import LossOutput, RawBatch


class Point(NamedTuple):
    lr: float
    loss: float
    spread: float
    """mean over the dimensions of the standard deviation of the embedding over the batch"""


@dataclass(frozen=True, kw_only=True)
class Ramp(Schedule):
    """From `low` to `lr` in equal ratios; weight decay stays as at the start."""

    low: float

    def lr_at(self, step: int) -> float:
        return self.low * (self.lr / self.low) ** (step / max(1, self.total_steps - 1))


def ramp(plan: Plan, components: TrainComponents, batches: Iterator[RawBatch], schedule: Ramp) -> Iterator[Point]:
    """Train while the learning rate grows, to the end or until the loss is not finite; the weights are spent."""
    components, spreads = replace(components, schedule=schedule, guard=None), []

    def note(module: object, arguments: object, output: LossOutput) -> None:
        spreads.append(output.embedding.float().std(0).mean())

    components.objective.register_forward_hook(note)
    for step in range(schedule.total_steps):
        spreads.clear()
        output, _ = one_step(plan, components, next(batches), step)
        loss, spread = torch.stack([output.loss.float(), torch.stack(spreads).mean()]).tolist()
        if not math.isfinite(loss):
            return
        yield Point(schedule.lr_at(step), loss, spread)


SMOOTHING = 0.85
KEPT_SPREAD = 0.5
"""share of the spread at the start below which the features are taken to collapse"""
RISE = 0.1
"""share of the loss's fall by which it must rise to have turned"""
SETTLED = 0.9
"""share of its fall after which the loss is where it will stay"""
SAFETY = {"collapse": 1.0, "settled": 1.0, "turn": 0.1, "end": 0.1}
"""which share of the learning rate where something happens is still good for a whole run; found by trial"""


class Found(NamedTuple):
    lr: float
    reason: str
    limits: dict[str, float]
    """learning rate at which each thing happens"""


REASONS = {
    "collapse": "the spread of the features falls below half at lr {:.2g}",
    "settled": "the loss has done nine tenths of its fall at lr {:.2g}",
    "turn": "the loss turns up at lr {:.2g}, and a tenth of that is safe",
    "end": "the last lr with a finite loss is {:.2g}, and a tenth of that is safe",
}


def choose(points: Sequence[Point]) -> Found | None:
    """The smallest of the limits, each with its share; None where too little was seen or nothing was learned."""
    if len(points) < 10:
        return None
    lrs = [point.lr for point in points]
    loss, spread = (smooth(values) for values in zip(*(point[1:] for point in points), strict=True))
    first = max(1, len(points) // 10)
    start, begun = sum(loss[:first]) / first, sum(spread[:first]) / first
    fall = start - min(loss)
    if fall <= max(loss[:first]) - min(loss[:first]):
        return None
    settled = next(i for i, value in enumerate(loss) if start - value >= SETTLED * fall)
    limits = {"settled": lrs[settled], "end": lrs[-1]}
    collapsed = next((i for i, value in enumerate(spread) if value < KEPT_SPREAD * begun), None)
    turned = next((i for i in range(len(loss)) if loss[i] - min(loss[: i + 1]) > RISE * fall), None)
    limits |= {name: lrs[i] for name, i in (("collapse", collapsed), ("turn", turned)) if i is not None}
    name = min(limits, key=lambda name: SAFETY[name] * limits[name])
    lr = float(f"{SAFETY[name] * limits[name]:.1e}")
    return Found(lr, REASONS[name].format(limits[name]), limits)


def smooth(values: Sequence[float]) -> list[float]:
    """Exponential mean without the bias of its start."""
    mean, weight, found = 0.0, 0.0, []
    for value in values:
        mean, weight = SMOOTHING * mean + (1 - SMOOTHING) * value, SMOOTHING * weight + 1 - SMOOTHING
        found.append(mean / weight)
    return found


INTERRUPTED = 130
"""exit status after Ctrl-C"""
ROWS = 12
"""rows of the printed table, of all points"""


class Setting(NamedTuple):
    plan: Plan
    components: TrainComponents
    batches: Iterator[RawBatch]
    dataset_size: int


@contextmanager
def setting(config: TrainConfig) -> Iterator[Setting]:
    """A new model of the first phase, and its batches. Raises ConfigError for what only built components can tell."""
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
        yield Setting(plan, components, stream, len(dataset))


def find_lr(config: TrainConfig, overrides: Sequence[str], *, num_steps: int, low: float, high: float) -> int:
    """Prints a table, the choice and why; leaves find.html and find.json. The exit status."""
    points: list[Point] = []
    with setting(config) as (plan, components, stream, _):
        decay = components.schedule.weight_decay_at(0)
        schedule = Ramp(
            total_steps=num_steps, steps_per_epoch=1, lr=high, low=low, warmup_ratio=0, warmup_epochs=None,
            start_ratio=1, final_ratio=1, weight_decay=decay, final_weight_decay=decay,
        )  # fmt: skip
        stopped = collect(ramp(plan, components, stream, schedule), points)
    shown = points[:: max(1, len(points) // ROWS)]
    rows = [[f"{point.lr:.1e}", f"{point.loss:.4g}", f"{point.spread:.4g}"] for point in shown]
    print(Table(heads=["lr", "loss", "spread"], rows=rows).terminal(10), flush=True)
    found = choose(points)
    told = {"points": [point._asdict() for point in points], "found": found and found._asdict()}
    folder = write_result(config, "lr", told, charts=_charts(points, found.lr if found else None))
    if found is None:
        raise RunError(f"no lr found in {len(points)} steps: the loss did not fall; see {folder}/find.html")
    print(f"lr={found.lr:g}: {found.reason}\n{rerun_command(overrides, lr=f'{found.lr:g}')}\nchart: {folder}/find.html")
    return INTERRUPTED if stopped else 0


def _charts(points: Sequence[Point], lr: float | None) -> list[Markup]:
    """Loss and spread over the logarithm of the learning rate."""
    if not points:
        return []
    hint = f"Chosen: lr={lr:g}, whose logarithm is {math.log10(lr):.2f}." if lr else ""
    drawn = {"Loss, smoothed": [p.loss for p in points], "Spread of the features, smoothed": [p.spread for p in points]}
    charts = []
    for title, values in drawn.items():
        curve = [(math.log10(point.lr), value) for point, value in zip(points, smooth(values), strict=True)]
        chart = Chart(title=title, axis="lg lr", hint=hint, log_if_wide=True)
        charts.append(line_chart(chart, [Line(name="last value", points=curve)]))
    return charts


def collect(stream: Iterator, into: list, show=None) -> bool:
    """Whether Ctrl-C ended it; what came before is kept."""
    try:
        for item in stream:
            into.append(item)
            if show:
                print(show(item), flush=True)
    except KeyboardInterrupt:
        print("interrupted; with what was found so far:", flush=True)
        return True
    return False


def rerun_command(overrides: Sequence[str], **changes: str) -> str:
    kept = [text for text in overrides if text.lstrip("+").partition("=")[0] not in changes]
    return "  " + shlex.join(["jepa-train", *kept, *(f"{key}={value}" for key, value in changes.items())])


def write_result(
    config: TrainConfig, what: str, found: dict, *, charts: Sequence[Markup] = (), table: Table | None = None,
    lines: Sequence[str] = (),
) -> Path:  # fmt: skip
    folder = Path("outputs") / f"{config.name}-find-{what}"
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "find.json", json.dumps(found, indent=1))
    name = f"{config.name}: {'learning rate' if what == 'lr' else 'batch size'}"
    write_atomically(folder / "find.html", render("find.html", name=name, charts=charts, table=table, lines=lines))
    return folder
