"""Find the fastest micro-batch size, and the largest that fits in memory, by training steps of each size."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from jepa.config import TrainConfig
from jepa.errors import RunError
from jepa.layers.batch_norm import BatchNorm
from jepa.parallel.device import free_memory, peak_memory_gib
from jepa.reports.page import Table
from jepa.training.find_lr import INTERRUPTED, collect, prepare, rerun_command, write_result
from jepa.training.loop import Plan, TrainComponents, one_step
from jepa.types import RawBatch

SECONDS = 0.5
"""Maximum duration of a timed step; longer ones are not repeated."""
ROUNDS = 3
"""Number of timed steps, of which the fastest counts."""
MEMORY_SHARE = 0.8
"""Share of the free memory that is used on a CPU, where the process would be killed without an exception."""
WIDTH = 10
"""Characters in a column of the table, which is printed row by row."""
EQUAL = 0.97
"""Fraction of the best speed that counts as equal; the smallest size with such a speed is chosen."""


class MeasuredSize(NamedTuple):
    size: int
    samples_per_s: float | None
    """None if the size does not fit."""
    memory_gib: float
    note: str = ""


def divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def try_sizes(plan: Plan, components: TrainComponents, raw: RawBatch, sizes: Sequence[int]) -> Iterator[MeasuredSize]:
    """Trials from the smallest size to the first that does not fit; the model must not be used afterwards."""
    device, last = components.session.device, None
    base = peak_memory_gib(device)
    for size in sorted(sizes):
        growth = (last.memory_gib - base) * (size / last.size - 1) if last else 0.0
        if device.type == "cpu" and last and growth > MEMORY_SHARE * (free := free_memory() / 2**30):
            yield MeasuredSize(size, None, last.memory_gib + growth, f"not tried: {free:.1f} GiB are free")
            return
        try:
            last = MeasuredSize(size, *_measure(replace(plan, micro_batch_size=size), components, raw))
        except torch.OutOfMemoryError:
            yield MeasuredSize(size, None, peak_memory_gib(device), "out of memory")
            return
        except ValueError as error:
            yield MeasuredSize(size, None, 0.0, str(error))
            continue
        finally:
            components.optimizer.zero_grad(set_to_none=True)
            gc.collect()
            if components.session.device.type == "cuda":
                torch.cuda.empty_cache()
        yield last


def _measure(plan: Plan, components: TrainComponents, raw: RawBatch) -> tuple[float, float]:
    """Samples per second and peak memory of steps with all micro-batches of a batch, or as many as fit in SECONDS."""
    device, size = components.session.device, plan.micro_batch_size
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = [_seconds(plan, components, raw, size) for _ in range(2)][-1]
    count = size * max(1, min(plan.batch_size // size, int(SECONDS / seconds)))
    if seconds < SECONDS:
        size, seconds = count, min(_seconds(plan, components, raw, count) for _ in range(ROUNDS))
    return size / seconds, peak_memory_gib(device)


def _seconds(plan: Plan, components: TrainComponents, raw: RawBatch, count: int) -> float:
    """Seconds of one step with `count` samples, which repeat those of `raw`."""
    rows = torch.arange(count) % len(raw.pixels)
    batch = raw.map(lambda part: part if part is raw.broken else part[rows])
    begun = time.perf_counter()
    output, _ = one_step(replace(plan, batch_size=count), components, batch, 0)
    output.loss.cpu()
    return time.perf_counter() - begun


def fastest(trials: Sequence[MeasuredSize]) -> MeasuredSize | None:
    """The smallest size that is about as fast as the fastest."""
    best = max((trial.samples_per_s or 0.0 for trial in trials), default=0.0)
    return next((trial for trial in trials if trial.samples_per_s and trial.samples_per_s >= EQUAL * best), None)


def find_batch(config: TrainConfig, overrides: Sequence[str], *, largest: bool) -> int:
    """Print a table and the choice, write find.html and find.json; returns the exit status."""
    trials: list[MeasuredSize] = []
    print(_table([]).terminal(WIDTH), flush=True)
    with prepare(config) as (plan, components, stream, num_samples):
        raw, batch = next(stream), plan.batch_size
        has_batch_norm = any(isinstance(module, BatchNorm) for module in components.objective.modules())
        larger = [batch * 2**k for k in range(1, 20) if batch * 2**k <= num_samples] if largest else []
        stopped = collect(try_sizes(plan, components, raw, divisors(batch) + larger), trials, _line)
    chosen, fits = fastest([t for t in trials if t.size <= batch]), [t.size for t in trials if t.samples_per_s]
    lines = []
    if chosen:
        size = chosen.size
        lines.append(f"micro_batch_size={size}: as fast as any that fits; a step still has batch_size={batch} samples")
        lines.append(rerun_command(overrides, micro_batch_size=str(size)))
    if has_batch_norm and chosen and chosen.size < batch:
        lines.append("predictor: batch norm sees one micro-batch at a time, so its size changes what is learned")
    if largest and fits and max(fits) > 1:
        size, lr = max(fits), config.lr * (max(fits) / batch) ** 0.5
        lines.append(f"batch_size={size} is the largest tried that fits; by the square root rule for Adam lr={lr:.2g}")
        lines.append(rerun_command(overrides, batch_size=str(size), micro_batch_size="null", lr=f"{lr:.2g}"))
    result = {"trials": [trial._asdict() for trial in trials], "found": chosen and chosen.size}
    marks = {(row, 0) for row, trial in enumerate(trials) if trial is chosen}
    folder = write_result(config, "batch", result, table=replace(_table(trials), best=marks), lines=lines)
    if stopped and chosen is None:
        raise KeyboardInterrupt
    if chosen is None:
        raise RunError("not even one sample fits; see the table" if trials else "no size was measured")
    print("\n".join([*lines, f"table: {folder}/find.html"]))
    return INTERRUPTED if stopped else 0


def _table(trials: Sequence[MeasuredSize]) -> Table:
    speeds = [f"{trial.samples_per_s:.1f}" if trial.samples_per_s else "-" for trial in trials]
    rows = [[str(t.size), speed, f"{t.memory_gib:.2f}", t.note] for t, speed in zip(trials, speeds, strict=True)]
    return Table(heads=["size", "samples/s", "memory GiB", ""], rows=rows, text_columns={3})


def _line(trial: MeasuredSize) -> str:
    """The row of one size, aligned as in the whole table."""
    return _table([trial]).terminal(WIDTH).splitlines()[1]
