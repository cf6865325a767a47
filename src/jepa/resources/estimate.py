"""Estimate of a run on given hardware, without training: parameters, memory, time (`estimate=true`)."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from jepa.config import TrainConfig, factory
from jepa.config.auto import chosen_lines
from jepa.data.loader import blank_fields
from jepa.errors import RunError, as_config_errors
from jepa.layers.attention import choose_attention
from jepa.layers.shapes import ShapesOnly, fake_init
from jepa.reports.charts import number
from jepa.reports.page import Table
from jepa.reports.text import duration
from jepa.resources.assumed import find_dataset
from jepa.resources.footprint import block_sizes, measure, state_bytes
from jepa.resources.hardware import (
    DISK_GB,
    GIB,
    GPUS,
    LINK_SHARE,
    STRATEGIES,
    USABLE,
    Cluster,
    ModelCost,
    RankLoad,
    fits,
    largest_micro_batch,
    memory,
    rank_load,
    step_time,
    traffic,
)
from jepa.seeding import generator
from jepa.training.assemble import Phase, image_size, make_augment, make_objective, split_phases
from jepa.types import Batch, Dataset, DatasetTraits

FILES = 200
"""Number of files of which the mean size is taken."""
ZERO = "0.00"
SHORT_STEP = 2e-3
"""Seconds of computing below which the launches of a step's kernels take longer than what they compute."""
UNTRACEABLE = (RuntimeError, TypeError, AttributeError, LookupError, AssertionError)
"""Errors that a foreign component may raise on fake tensors."""


VALUES_NEEDED = (DynamicOutputShapeException, DataDependentOutputException)
"""Errors on fake tensors of a model whose shapes depend on values, as the number of boxes that a detector proposes."""


class FakeModel:
    """The objective of a configuration on fake tensors, with masks of one sample; it takes no memory.

    With `has_values` on tensors with values, of noise.
    """

    def __init__(self, config: TrainConfig, dataset: Dataset, *, has_values: bool = False) -> None:
        self.config, self.shapes_only = config, nullcontext() if has_values else ShapesOnly()
        plan = SimpleNamespace(batch_size=config.batch_size, total_steps=1)
        init = fake_init(self.shapes_only) if isinstance(self.shapes_only, ShapesOnly) else nullcontext()
        with torch.random.fork_rng(devices=[]), init:
            self.objective, _ = make_objective(config, dataset, plan)  # pyright: ignore[reportArgumentType]
            choose_attention(self.objective.train(), torch.device("cuda"), torch.bfloat16)
        masker = factory(config.mask)(grid=self.objective.backbone.grid)
        self.masks = masker(1, generator(config.seed, 0, 0, "masks"))
        self.fields = DatasetTraits.of(dataset).fields
        has_local = config.augment.local_views > 0
        self.local_size = make_augment(config, dataset, self.objective).local_size if has_local else None

    def cost(self, samples: int, *, bf16: bool, backward: bool = True) -> ModelCost:
        """The cost of a sample, measured on a pass of so many."""
        objective, augment = self.objective, self.config.augment
        rows, shape = samples * augment.views, objective.backbone.clip_shape
        with self.shapes_only:
            size = self.local_size
            local = torch.empty(samples * augment.local_views, *shape[:2], *size) if size else None
            batch = Batch(torch.rand(rows, *shape), blank_fields(self.fields, rows), augment.views, local)
            masks = self.masks.map(lambda indices: torch.empty(rows, *indices.shape[1:], dtype=torch.long))
            measured = measure(objective, batch, masks, bf16=bf16, backward=backward)
        block, outside_blocks = block_sizes(objective)
        parameters = list(objective.parameters())
        return ModelCost(
            encoder=sum(p.numel() for p in objective.backbone.parameters()),
            trained=sum(p.numel() for p in parameters if p.requires_grad),
            frozen=sum(p.numel() for p in parameters if not p.requires_grad), block=block,
            outside_blocks=outside_blocks, state=state_bytes(factory(self.config.optimizer)),
            forward=measured.forward / samples, backward=measured.backward / samples,
            activations=measured.activations / samples,
            workspace=(measured.peak - measured.activations - measured.casts) / samples, casts=measured.casts,
            needs_grad_cache=objective.regularization is not None,
        )  # fmt: skip


def model_cost(config: TrainConfig, dataset: Dataset, samples: int, *, bf16: bool) -> ModelCost:
    """Raises ConfigError if a constructor refuses its arguments, RunError if a component fails on fake tensors."""
    try:
        with as_config_errors():
            try:
                return FakeModel(config, dataset).cost(samples, bf16=bf16)
            except VALUES_NEEDED:
                return FakeModel(config, dataset, has_values=True).cost(1, bf16=bf16)
    except UNTRACEABLE as error:
        raise RunError(
            f"estimate=true: this model cannot run on tensors without values ({error}); without estimate=true a run "
            "measures a step first and prints its time"
        ) from error


def make_cluster(config: TrainConfig) -> Cluster:
    """The GPUs of `hardware`; precision=auto is bfloat16 on all but `cpu`."""
    values = asdict(config.hardware)
    name = values.pop("gpu")
    bf16 = config.precision == "bf16" or (config.precision == "auto" and name != "cpu")
    return Cluster(gpu=GPUS[name], bf16=bf16, **values)


def print_estimate(config: TrainConfig, folder: Path) -> int:
    """Print the estimate and remove the empty run folder; returns the exit status."""
    print(estimate(config), flush=True)
    for parent in (folder, *folder.parents):
        with suppress(OSError):
            parent.rmdir()  # fails, as it should, if the folder is not empty
    return 0


def print_estimates(configs: Mapping[str, TrainConfig]) -> int:
    """Print the estimate of each run under its label; returns the exit status."""
    print("\n\n".join(f"{label}\n" * bool(label) + estimate(config) for label, config in configs.items()), flush=True)
    return 0


def estimate(config: TrainConfig) -> str:
    """The text for all phases of the run."""
    dataset, assumed = find_dataset(config)
    cluster, strategy = make_cluster(config), config.strategy
    if strategy == "auto":
        strategy = "ddp" if cluster.count > 1 else "single"
    phases = split_phases(config, len(dataset))
    texts, total = ["\n".join([_hardware(config, cluster) + assumed, *chosen_lines(asdict(config))])], 0.0
    for place, phase in enumerate(phases, start=1):
        num_steps = phase.end_step - phase.begin_step
        if len(phases) > 1:
            texts.append(f"phase {place} of {len(phases)}: {num_steps:,} steps")
        load = rank_load(strategy, cluster.count, config.batch_size, phase.config.micro_batch_size)
        cost = model_cost(phase.config, dataset, load.micro_batch_size, bf16=cluster.bf16)
        seconds = sum(step_time(cost, load, cluster))
        total += seconds * num_steps
        texts += [_model(cost, phase, len(dataset)), _table(cost, phase, cluster, len(dataset), strategy)]
        texts.append(_loader(phase.config, dataset, load, cluster, seconds))
        if seconds < SHORT_STEP:
            texts.append("steps this short last longer: starting the kernels of a step takes ms, which are not counted")
        if place == len(phases):
            size = cost.checkpoint / 1e9
            texts.append(f"checkpoint  {size_text(size)} GB, {seconds_text(size / DISK_GB)} at {DISK_GB:g} GB/s")
    if len(phases) > 1:
        texts.append(f"all phases: {duration(total)} with strategy={strategy}")
    return "\n\n".join(texts)


def _hardware(config: TrainConfig, cluster: Cluster) -> str:
    gpu, nodes = cluster.gpu, cluster.num_nodes
    peak = gpu.tflops / (1 if cluster.bf16 else gpu.slowdown_fp32)
    return (
        f"calculated, not measured: {cluster.count} x {config.hardware.gpu} on {nodes} node{'s' * (nodes > 1)} "
        f"in {'bf16' if cluster.bf16 else 'fp32'}\n"
        f"assumed: {cluster.utilisation:.0%} of {peak:g} TFLOP/s, communication apart; {USABLE:.0%} of "
        f"{gpu.memory_gib} GiB; {LINK_SHARE:.0%} of {gpu.link_gb:g} GB/s in a node and of {gpu.network_gb:g} GB/s a "
        f"GPU between nodes; no torch.compile"
    )


def _model(cost: ModelCost, phase: Phase, num_samples: int) -> str:
    config, steps = phase.config, phase.end_step - phase.begin_step
    twice = ", and another forward pass if a batch has several micro-batches" if cost.needs_grad_cache else ""
    return (
        f"parameters  encoder {number(cost.encoder)}; trained {number(cost.trained)}, without gradient "
        f"{number(cost.frozen)}\n"
        f"FLOPs       forward {number(cost.forward)} a sample, forward and backward "
        f"{number(cost.forward + cost.backward)}{twice}\n"
        f"samples     {num_samples:,}, {config.batch_size:,} a step; {num_samples // config.batch_size:,} steps an "
        f"epoch, {steps:,} in all"
    )


def _table(cost: ModelCost, phase: Phase, cluster: Cluster, num_samples: int, chosen: str) -> str:
    """One column per strategy, with a star at the chosen one."""
    columns = [_column(cost, phase, cluster, num_samples, strategy) for strategy in STRATEGIES]
    names = [f"{name}{'*' * (name == chosen)}" for name in STRATEGIES]
    rows = [[key, *(column[key] for column in columns)] for key in columns[0]]
    return Table(heads=["", *names], rows=[row for row in rows if set(row[1:]) != {ZERO}]).terminal(13)


def _column(cost: ModelCost, phase: Phase, cluster: Cluster, num_samples: int, strategy: str) -> dict[str, str]:
    config = phase.config
    load = rank_load(strategy, cluster.count, config.batch_size, config.micro_batch_size)
    parts = memory(cost, load, cluster)
    computing, waiting = step_time(cost, load, cluster)
    step = computing + waiting
    largest = largest_micro_batch(cost, load, cluster)
    return {
        "ranks": f"{load.ranks:,}", "samples of a rank, at once": f"{load.samples:,}, {load.micro_batch_size:,}",
        **{f"GiB {name}": size_text(size / GIB) for name, size in parts.items()},
        "GiB a rank in all": f"{sum(parts.values()) / GIB:.1f}", "fits": "yes" if fits(cost, load, cluster) else "no",
        "largest micro_batch_size": f"{largest:,}" if largest else "none",
        "GB a rank sends in a step": size_text(traffic(cost, load, cluster) / 1e9), "step": seconds_text(step),
        "of it waiting for communication": seconds_text(waiting),
        "epoch": seconds_text(step * (num_samples // config.batch_size)),
        "all steps": seconds_text(step * (phase.end_step - phase.begin_step)),
    }  # fmt: skip


def seconds_text(seconds: float) -> str:
    if seconds >= 100:
        return duration(seconds)
    if seconds >= 1 or not seconds:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{number_text(seconds * 1e6)} us"


def size_text(size: float) -> str:
    """Two decimals, three of small sizes; only nothing at all is zero."""
    if size >= 0.01 or not size:
        return f"{size:.2f}"
    return f"{size:.3f}" if size >= 0.001 else "<0.001"


def number_text(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _loader(config: TrainConfig, dataset: Dataset, load: RankLoad, cluster: Cluster, seconds: float) -> str:
    per_node = load.samples * min(load.ranks, cluster.per_node) / seconds
    height, width = image_size(config)
    pixels = per_node * dataset.channels * config.num_frames * height * width / 1e6
    text = f"loader      {number_text(per_node)} samples/s a node, {number_text(pixels)} MB/s of pixels"
    if size := mean_file_size(dataset):
        text += f", {number_text(per_node * size / 1e6)} MB/s from disk (files of {number_text(size / 1e3)} kB)"
    return text


def mean_file_size(dataset: Dataset) -> float | None:
    """Mean size in bytes of the samples' files, from some of them; None if samples are not files."""
    indices = range(0, len(dataset), max(1, len(dataset) // FILES))
    files = [Path(dataset.describe(index)) for index in indices]
    return statistics.fmean(file.stat().st_size for file in files) if all(file.is_file() for file in files) else None
