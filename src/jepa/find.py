"""jepa-find: what to set lr and micro_batch_size to, found on a fresh model; its run is left alone."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import NamedTuple

from jepa.assemble import make_dataset, make_parts, make_plan, split_phases
from jepa.charts import Chart, Line, line_chart
from jepa.config import ConfigError, TrainConfig
from jepa.data.loader import batches
from jepa.distributed import open_session
from jepa.folder_log import write_atomically
from jepa.report import page
from jepa.training.batch_fit import Trial, divisors, fastest, try_sizes
from jepa.training.loop import Parts, Plan
from jepa.training.lr_range import Point, Ramp, choose, ramp, smooth
from jepa.types import RawBatch, RunError

INTERRUPTED = 130
ROWS = 12


class Setting(NamedTuple):
    plan: Plan
    parts: Parts
    batches: Iterator[RawBatch]
    dataset_size: int


@contextmanager
def setting(config: TrainConfig) -> Iterator[Setting]:
    """A fresh model of the first phase, with its batches. Raises ConfigError for what only the built parts can tell."""
    try:
        config = replace(config, compile=False)
        dataset = make_dataset(config)
        phase = split_phases(config, len(dataset))[0]
        dataset = dataset if phase.config.num_frames == config.num_frames else make_dataset(phase.config)
        session = open_session(device=config.device, precision=config.precision)
        plan = make_plan(phase, len(dataset))
        parts = make_parts(phase.config, dataset, plan, session)
        stream = batches(
            dataset, batch_size=plan.batch_size, seed=config.seed, num_workers=config.num_workers,
            canvas=parts.augment.canvas,
        )  # fmt: skip
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError([str(error)]) from error
    with closing(stream):
        yield Setting(plan, parts, stream, len(dataset))


def find_lr(config: TrainConfig, overrides: Sequence[str], *, num_steps: int, low: float, high: float) -> int:
    """Prints a table, the choice and why; leaves find.html and find.json. The exit status."""
    points: list[Point] = []
    with setting(config) as (plan, parts, stream, _):
        decay = parts.schedule.weight_decay_at(0)
        schedule = Ramp(
            total_steps=num_steps, steps_per_epoch=1, lr=high, low=low, warmup_ratio=0, warmup_epochs=None,
            start_ratio=1, final_ratio=1, weight_decay=decay, final_weight_decay=decay,
        )  # fmt: skip
        stopped = _collect(ramp(plan, parts, stream, schedule), points)
    lines = [f"{'lr':>10}{'loss':>12}{'spread':>12}"]
    shown = points[:: max(1, len(points) // ROWS)]
    lines += [f"{point.lr:>10.1e}{point.loss:>12.4g}{point.spread:>12.4g}" for point in shown]
    print("\n".join(lines), flush=True)
    found = choose(points)
    told = {"points": [point._asdict() for point in points], "found": found and found._asdict()}
    folder = _write(config, "lr", told, _charts(points, found.lr if found else None))
    if found is None:
        raise RunError(f"no lr found in {len(points)} steps: the loss did not fall; see {folder}/find.html")
    print(f"lr={found.lr:g}: {found.reason}\n{_command(overrides, lr=f'{found.lr:g}')}\nchart: {folder}/find.html")
    return INTERRUPTED if stopped else 0


def _charts(points: Sequence[Point], lr: float | None) -> list[str]:
    """Loss and spread over the logarithm of the learning rate."""
    if not points:
        return []
    hint = f"Chosen: lr={lr:g}, whose logarithm is {math.log10(lr):.2f}." if lr else ""
    drawn = {"Loss, smoothed": [p.loss for p in points], "Spread of the features, smoothed": [p.spread for p in points]}
    charts = []
    for title, values in drawn.items():
        curve = [(math.log10(point.lr), value) for point, value in zip(points, smooth(values), strict=True)]
        chart = Chart(title=title, axis="lg lr", hint=hint, may_be_log=True)
        charts.append(line_chart(chart, [Line(name="last value", points=curve)]))
    return [f'<div class="charts">{"".join(charts)}</div>']


def find_batch(config: TrainConfig, overrides: Sequence[str], *, largest: bool) -> int:
    """Prints a table and the choice; leaves find.html and find.json. The exit status."""
    trials: list[Trial] = []
    print(f"{'size':>8}{'samples/s':>12}{'memory GiB':>12}", flush=True)
    with setting(config) as (plan, parts, stream, num_samples):
        raw, batch = next(stream), plan.batch_size
        beyond = [batch * 2**k for k in range(1, 20) if batch * 2**k <= num_samples] if largest else []
        stopped = _collect(try_sizes(plan, parts, raw, divisors(batch) + beyond), trials, _row)
    chosen, fits = fastest([t for t in trials if t.size <= batch]), [t.size for t in trials if t.samples_per_s]
    lines = []
    if chosen:
        told = "fastest, or as good as that, of those that fit"
        lines += [f"micro_batch_size={chosen.size}: {told}; a step still sees batch_size={batch}"]
        lines += [_command(overrides, micro_batch_size=str(chosen.size))]
    if "Projector" in str(config.predictor.get("_target_")) and chosen and chosen.size < batch:
        lines.append(
            "predictor=projector: batch norm sees a micro-batch at a time, so its size changes what is learned"
        )
    if largest and fits and max(fits) > 1:
        size, lr = max(fits), config.lr * (max(fits) / batch) ** 0.5
        lines.append(f"batch_size={size} is the largest tried that fits; by the square root rule for Adam lr={lr:.2g}")
        lines.append(_command(overrides, batch_size=str(size), micro_batch_size="null", lr=f"{lr:.2g}"))
    table = {"trials": [trial._asdict() for trial in trials], "found": chosen and chosen.size}
    folder = _write(config, "batch", table, [f"<pre>{escape(chr(10).join([*map(_row, trials), *lines]))}</pre>"])
    if chosen is None:
        raise RunError("no size was measured" if stopped or not trials else "not even one sample fits; see the table")
    print("\n".join([*lines, f"table: {folder}/find.html"]))
    return INTERRUPTED if stopped else 0


def _row(trial: Trial) -> str:
    speed = f"{trial.samples_per_s:.1f}" if trial.samples_per_s else "-"
    return f"{trial.size:>8}{speed:>12}{trial.memory_gib:>12.2f}  {trial.note}".rstrip()


def _collect(stream: Iterator, into: list, show=None) -> bool:
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


def _command(overrides: Sequence[str], **changes: str) -> str:
    kept = [text for text in overrides if text.lstrip("+").partition("=")[0] not in changes]
    return "  " + shlex.join(["jepa-train", *kept, *(f"{key}={value}" for key, value in changes.items())])


def _write(config: TrainConfig, what: str, found: dict, body: Sequence[str]) -> Path:
    folder = Path("outputs") / f"{config.name}-find-{what}"
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "find.json", json.dumps(found, indent=1))
    title = f"{config.name}: {'learning rate' if what == 'lr' else 'batch size'}"
    write_atomically(folder / "find.html", page(title, [f"<header><h1>{escape(title)}</h1></header>", *body]))
    return folder
