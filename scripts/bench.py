"""How fast a training step is, where its time goes, and how that compares.

python scripts/bench.py [--steps N] [--reference CHECKOUT] [--loader] [--processes] [OVERRIDE ...]

The overrides are those of jepa-train, `experiment=NAME` among them; without any, ViT-B/16 at 224 pixels with batch 8.
Prints a table and, as the last line, the same as one JSON object. `--reference` takes a checkout of
facebookresearch/ijepa or facebookresearch/vjepa2 and runs its step in turn with ours on the same clips, sizes and block
geometry (without overrides ViT-S/16 on 16 frames of 112 pixels with batch 4 for the latter): `step_ratio` is the median
over the turns of its time (float32, as it ships) over ours, `step_ratio_bf16` the same with its step under bf16
autocast. `--loader` adds decoding and augmentation against Pillow (bench_loader.py), `--processes` what two ranks,
saves and the start of a run cost on the CPU (bench_processes.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench_loader import measure_loader
from bench_processes import measure_processes
from bench_reference import ImageStep, ReferenceStep, find_reference
from jepa.config import ConfigError, TrainConfig, compose
from jepa.data.loader import batches
from jepa.parallel.device import has_fast_bf16, peak_memory_gib
from jepa.parallel.session import Session, open_session
from jepa.training.assemble import make_components, make_dataset, make_plan, split_phases
from jepa.training.loop import Plan, TrainComponents, one_step
from jepa.types import Batch, Masks, RawBatch

PARTS = ("mask", "target", "context+predictor", "backward", "optimizer+EMA", "data")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5, help="measured steps, after one to warm up")
    parser.add_argument("--reference", type=Path, metavar="CHECKOUT", help="a checkout of ijepa or vjepa2")
    parser.add_argument("--loader", action="store_true", help="measure decoding and augmentation as well")
    parser.add_argument("--processes", action="store_true", help="measure two ranks, saves and the start as well")
    parser.add_argument("overrides", nargs="*", help="as for jepa-train")
    chosen = parser.parse_args(arguments)
    try:
        reference = find_reference(chosen.reference) if chosen.reference else None
        sizes = chosen.overrides or (reference or ImageStep).SIZES
        overrides = [*(reference.SAME_TASK if reference else ()), *sizes]
        config = compose(overrides)
        say(f"measuring some {2 + 3 * chosen.steps // 2} steps of {' '.join(overrides)}")
        report = {"overrides": overrides} | measure(config, chosen.steps)
        if reference:
            say(f"{chosen.steps} turns with the reference, after one to warm up")
            report |= compare(config, partial(reference, chosen.reference, config), chosen.steps)
    except (ConfigError, ValueError) as fault:
        print(fault, file=sys.stderr)
        return 2
    if chosen.loader:
        report |= measure_loader()
    if chosen.processes:
        report |= measure_processes(config, overrides, chosen.steps)
    print(table(report))
    print(json.dumps(report))
    return 0


def say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


class Bench:
    """The components of a run, without folder, evaluation and loggers."""

    def __init__(self, config: TrainConfig) -> None:
        self.session: Session = open_session(device=config.device, precision=config.precision)
        dataset = make_dataset(config)
        self.plan: Plan = make_plan(split_phases(config, len(dataset))[0], len(dataset))
        self.components: TrainComponents = make_components(config, dataset, self.plan, self.session)
        self.raw: Iterator[RawBatch] = batches(
            dataset,
            batch_size=self.plan.batch_size,
            seed=config.seed,
            num_workers=config.num_workers,
            pin_memory=self.session.device.type == "cuda",
            short_side=self.components.augment.short_side,
        )
        self.done = 0

    def step(self, components: TrainComponents | None = None) -> None:
        """A training step as the loop takes it, the wait for its data included."""
        one_step(self.plan, components or self.components, next(self.raw), self.done)
        self.done += 1

    def seconds(self, work: Callable[[], object]) -> float:
        self.synchronize()
        begun = time.perf_counter()
        work()
        self.synchronize()
        return time.perf_counter() - begun

    def synchronize(self) -> None:
        if self.session.device.type == "cuda":
            torch.cuda.synchronize(self.session.device)


def measure(config: TrainConfig, num_steps: int) -> dict[str, Any]:
    """Speed, memory and arithmetic of one step, and its components."""
    bench = Bench(config)
    device, batch_size = bench.session.device, bench.plan.batch_size
    with FlopCounterMode(display=False) as counter:
        bench.step()  # also warms up
    flops = counter.get_total_flops()
    step = statistics.median(bench.seconds(bench.step) for _ in range(num_steps))
    components = parts_of_a_step(bench, max(2, num_steps // 2))
    dtype = torch.bfloat16 if bench.session.bf16 else torch.float32
    rate = matmul_rate(bench, dtype)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "precision": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "batch_size": batch_size,
        "parameters": sum(p.numel() for group in bench.components.optimizer.param_groups for p in group["params"]),
        "step_ms": round(1000 * step, 2),
        "samples_per_s": round(batch_size / step, 3),
        "ms": {name: round(1000 * components.get(name, 0.0), 2) for name in PARTS},
        "peak_memory_mb": round(peak_memory_gib(device) * 1024),
        "gflops_per_sample": float(f"{flops / batch_size / 1e9:.4g}"),
        "matmul_gflops_per_s": round(rate / 1e9, 1),
        "matmul_share": float(f"{flops / step / rate:.3g}"),
    }


def parts_of_a_step(bench: Bench, num_steps: int) -> dict[str, float]:
    """Median seconds of each part; waiting for the device at every border costs a GPU a little speed."""
    watch = Stopwatch(bench)
    components = watch.attach(bench.components)
    rows = []
    for _ in range(num_steps):
        watch.enter("data")
        bench.step(components)
        rows.append(watch.stop())
    watch.detach()
    return {name: statistics.median(row.get(name, 0.0) for row in rows) for name in PARTS}


class Stopwatch:
    """Seconds by part: a part ends where the next begins, so that the components add up to the step."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.spent: dict[str, float] = {}
        self.part, self.since = "", 0.0
        self.hooks: list[Any] = []

    def enter(self, part: str) -> None:
        self.bench.synchronize()
        now = time.perf_counter()
        if self.part:
            self.spent[self.part] = self.spent.get(self.part, 0.0) + now - self.since
        self.part, self.since = part, now

    def stop(self) -> dict[str, float]:
        self.enter("")
        spent, self.spent = self.spent, {}
        return spent

    def attach(self, components: TrainComponents) -> TrainComponents:
        """The same components, timed by the watch; the parts of a compiled objective are not timed apart."""
        objective, target = components.wrapped, getattr(components.objective, "target_encoder", None)
        self.around(objective, "context+predictor", then="backward")
        if isinstance(target, nn.Module) and objective is components.objective:
            self.around(target, "target", then="context+predictor")
        self.hooks.append(components.optimizer.register_step_pre_hook(lambda *_: self.enter("optimizer+EMA")))

        def masker(batch_size: int, generator: torch.Generator):
            self.enter("mask")
            masks = components.masker(batch_size, generator)
            self.enter("data")
            return masks

        return dataclasses.replace(components, masker=masker)

    def around(self, module: nn.Module, part: str, then: str) -> None:
        self.hooks.append(module.register_forward_pre_hook(lambda *_: self.enter(part)))
        self.hooks.append(module.register_forward_hook(lambda *_: self.enter(then)))

    def detach(self) -> None:
        for hook in self.hooks:
            hook.remove()


def matmul_rate(bench: Bench, dtype: torch.dtype) -> float:
    """Best FLOP/s of this machine in large square products."""
    size = 8192 if bench.session.device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=bench.session.device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / min(bench.seconds(lambda: a @ b) for _ in range(5))


def compare(config: TrainConfig, build: Callable[[Tensor], ReferenceStep], num_steps: int) -> dict[str, Any]:
    """Our step and the reference's, taking turns on the same clips."""
    bench = Bench(config)
    device = bench.session.device
    batch = bench.components.augment(next(bench.raw), torch.Generator().manual_seed(0))
    batch = batch._replace(clips=batch.clips.to(device))
    reference = build(batch.clips)
    bench.components = dataclasses.replace(bench.components, augment=SameClips(batch))
    bench.raw = repeat(next(bench.raw))
    sides: dict[str, Callable[[], object]] = {"ours": bench.step, "reference": reference}
    without_bf16 = ""
    if has_fast_bf16(device):
        sides["reference_bf16"] = lambda: reference(bf16=True)
    else:
        without_bf16 = f"this {device.type} has no fast bfloat16"
    turns = take_turns(bench, sides, num_steps)
    ours = bench.components.masker(bench.plan.batch_size, torch.Generator().manual_seed(0))
    return {
        "turns_ms": {name: [round(1000 * spent) for spent in spents] for name, spents in turns.items()},
        "tokens": {"ours": count_tokens(ours), "reference": reference.tokens},
        "step_ratio": median_ratio(turns["reference"], turns["ours"]),
        "step_ratio_bf16": median_ratio(turns.get("reference_bf16"), turns["ours"]),
        "step_ratio_bf16_skipped": without_bf16,
    }


def count_tokens(masks: Masks) -> dict[str, Any]:
    """Of one sample, by mask set where there are several."""
    counts = {
        "context_tokens": [mask.context.shape[1] for mask in masks.sets],
        "target_tokens": [mask.targets.shape[2] for mask in masks.sets],
    }
    return {name: values[0] if len(values) == 1 else values for name, values in counts.items()}


class SameClips:
    """An augmentation that costs nothing and always gives the same."""

    views = 1

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def __call__(self, raw: RawBatch, generator: torch.Generator, *components: object) -> Batch:
        return self.batch


def repeat(raw: RawBatch) -> Iterator[RawBatch]:
    while True:
        yield raw


def take_turns(bench: Bench, sides: dict[str, Callable[[], object]], num_steps: int) -> dict[str, list[float]]:
    """Seconds of each side, A B A B, after one step each to warm up."""
    for step in sides.values():
        step()
    turns: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(num_steps):
        for name, step in sides.items():
            turns[name].append(bench.seconds(step))
    return turns


def median_ratio(slow: list[float] | None, fast: list[float]) -> float | None:
    return None if slow is None else round(statistics.median(a / b for a, b in zip(slow, fast, strict=True)), 3)


def table(report: dict[str, Any]) -> str:
    """The report for a person, one value a line."""
    lines = []
    for name, value in report.items():
        if isinstance(value, dict):
            lines += [f"{name + ' ' + key:<34}{item}" for key, item in value.items()]
        else:
            lines.append(f"{name:<34}{' '.join(value) if isinstance(value, list) else value}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
