"""What a configuration will need on given hardware, told without training: `estimate=true`, and advice on memory."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from jepa.config import TrainConfig, factory
from jepa.data.loader import blank_fields
from jepa.errors import RunError, as_config_errors
from jepa.layers.attention import choose_attention
from jepa.layers.shapes import ShapesOnly, fake_init
from jepa.reports.page import Table
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
    largest_piece,
    memory,
    share_of,
    step_time,
    traffic,
)
from jepa.seeding import generator
from jepa.training.assemble import Phase, image_size, make_augment, make_dataset, make_objective, split_phases
from jepa.training.progress import duration
from jepa.types import Batch, Dataset, DatasetTraits, Field, Masks

FILES = 200
"""of a folder, whose mean size is taken"""
NOTHING = "0.00"
UNTRACEABLE = (RuntimeError, TypeError, AttributeError, LookupError, AssertionError)
"""what a foreign component may raise on tensors without numbers"""


@dataclass(frozen=True, kw_only=True)
class Model:
    """An objective of sizes alone, and what it takes to run it."""

    sizes: ShapesOnly
    objective: Any
    masks: Masks
    views: int
    num_local: int
    local_size: tuple[int, int] | None
    fields: Mapping[str, Field]

    def needs(self, config: TrainConfig, samples: int, *, bf16: bool, backward: bool = True) -> ModelCost:
        """Counted on a pass of so many samples, with masks as one batch has them; other passes are in proportion."""
        rows, shape = samples * self.views, self.objective.backbone.clip_shape
        with self.sizes:
            local = torch.empty(samples * self.num_local, *shape[:2], *self.local_size) if self.local_size else None
            batch = Batch(torch.empty(rows, *shape), blank_fields(self.fields, rows), self.views, local)
            masks = self.masks.map(lambda indices: torch.empty(rows, *indices.shape[1:], dtype=torch.long))
            seen = measure(self.objective, batch, masks, bf16=bf16, backward=backward)
        block, rest = block_sizes(self.objective)
        numbers = [(p.numel(), p.requires_grad) for p in self.objective.parameters()]
        return ModelCost(
            encoder=sum(p.numel() for p in self.objective.backbone.parameters()),
            trained=sum(number for number, trained in numbers if trained),
            frozen=sum(number for number, trained in numbers if not trained),
            block=block,
            rest=rest,
            state=state_bytes(factory(config.optimizer)),
            forward=seen.forward / samples,
            backward=seen.backward / samples,
            activations=seen.activations / samples,
            workspace=(seen.peak - seen.activations - seen.casts) / samples,
            casts=seen.casts,
            solves_jointly=self.objective.regularization is not None,
        )


def make_sizes(config: TrainConfig, dataset: Dataset) -> Model:
    """The objective of a configuration in no memory; masks are those of one sample."""
    sizes, plan = ShapesOnly(), SimpleNamespace(batch_size=config.batch_size, total_steps=1)
    with torch.random.fork_rng(devices=[]), fake_init(sizes):
        objective, _ = make_objective(config, dataset, plan)  # pyright: ignore[reportArgumentType]
        choose_attention(objective.train(), torch.device("cuda"), torch.bfloat16)
    masker = factory(config.mask)(grid=objective.backbone.grid)
    augment = config.augment
    local = make_augment(config, dataset, objective).local_size if augment.local_views else None
    return Model(
        sizes=sizes,
        objective=objective,
        masks=masker(1, generator(config.seed, 0, 0, "masks")),
        views=augment.views,
        num_local=augment.local_views,
        local_size=local,
        fields=DatasetTraits.of(dataset).fields,
    )


def needs_of(config: TrainConfig, dataset: Dataset, samples: int, *, bf16: bool) -> ModelCost:
    """Raises ConfigError where a constructor refuses, RunError for components that cannot do without numbers."""
    try:
        with as_config_errors():
            return make_sizes(config, dataset).needs(config, samples, bf16=bf16)
    except UNTRACEABLE as error:
        raise RunError(
            f"estimate=true: this model cannot be run without numbers ({error}); without estimate=true a run "
            "says first what a step takes here"
        ) from error


def machines_of(config: TrainConfig) -> Cluster:
    """Those of `hardware`; bfloat16 where the GPU is fast at it."""
    values = asdict(config.hardware)
    name = values.pop("gpu")
    bf16 = config.precision == "bf16" or (config.precision == "auto" and name != "cpu")
    return Cluster(gpu=GPUS[name], bf16=bf16, **values)


def tell(config: TrainConfig, folder: Path) -> int:
    """Prints what `estimate=true` asks for; no run folder is left behind."""
    print(estimate(config), flush=True)
    for made in (folder, *folder.parents):
        with suppress(OSError):
            made.rmdir()  # which stays where something is in it
    return 0


def estimate(config: TrainConfig) -> str:
    """Every phase of the run, on `hardware`."""
    with as_config_errors():
        dataset = make_dataset(config)
    machines = machines_of(config)
    phases = split_phases(config, len(dataset))
    texts, total = [_hardware(config, machines)], 0.0
    for number, phase in enumerate(phases, start=1):
        if len(phases) > 1:
            texts.append(f"phase {number} of {len(phases)}: {phase.end_step - phase.begin_step:,} steps")
        share = share_of(_strategy(config), machines.count, config.batch_size, phase.config.micro_batch_size)
        needs = needs_of(phase.config, dataset, share.piece, bf16=machines.bf16)
        texts += [_model(needs, phase, len(dataset)), _table(needs, phase, machines, len(dataset))]
        seconds = sum(step_time(needs, share, machines))
        total += seconds * (phase.end_step - phase.begin_step)
        texts.append(_loader(phase.config, dataset, share, machines, seconds))
        if number == len(phases):
            texts.append(_checkpoint(needs))
    if len(phases) > 1:
        texts.append(f"all phases: {duration(total)} with strategy={_strategy(config)}")
    return "\n\n".join(texts)


def _strategy(config: TrainConfig) -> str:
    if config.strategy != "auto":
        return config.strategy
    return "ddp" if config.hardware.count > 1 else "single"


def _hardware(config: TrainConfig, machines: Cluster) -> str:
    gpu, nodes = machines.gpu, machines.num_nodes
    peak = gpu.tflops / (1 if machines.bf16 else gpu.slowdown_fp32)
    return (
        f"calculated, not measured: {machines.count} x {config.hardware.gpu} on {nodes} node{'s' * (nodes > 1)} "
        f"in {'bf16' if machines.bf16 else 'fp32'}\n"
        f"assumed: {machines.utilisation:.0%} of {peak:g} TFLOP/s, communication apart; {USABLE:.0%} of "
        f"{gpu.memory_gib} GiB; {LINK_SHARE:.0%} of {gpu.link_gb:g} GB/s in a node and of {gpu.network_gb:g} GB/s a "
        f"GPU between nodes; no torch.compile"
    )


def _model(needs: ModelCost, phase: Phase, num_samples: int) -> str:
    config, steps = phase.config, phase.end_step - phase.begin_step
    twice = ", and another forward pass where a batch has several pieces" if needs.solves_jointly else ""
    return (
        f"parameters  encoder {needs.encoder / 1e6:,.1f} M; trained {needs.trained / 1e6:,.1f} M, without gradient "
        f"{needs.frozen / 1e6:,.1f} M\n"
        f"FLOPs       forward {needs.forward / 1e9:,.1f} G a sample, forward and backward "
        f"{(needs.forward + needs.backward) / 1e9:,.1f} G{twice}\n"
        f"samples     {num_samples:,}, {config.batch_size:,} a step; {num_samples // config.batch_size:,} steps an "
        f"epoch, {steps:,} in all"
    )


def _table(needs: ModelCost, phase: Phase, machines: Cluster, num_samples: int) -> str:
    """One column for each strategy, that of the configuration with a star."""
    chosen = _strategy(phase.whole)
    columns = [_column(needs, phase, machines, num_samples, strategy) for strategy in STRATEGIES]
    names = [f"{name}{'*' * (name == chosen)}" for name in STRATEGIES]
    rows = [[key, *(column[key] for column in columns)] for key in columns[0]]
    return Table(heads=["", *names], rows=[row for row in rows if set(row[1:]) != {NOTHING}]).terminal(13)


def _column(needs: ModelCost, phase: Phase, machines: Cluster, num_samples: int, strategy: str) -> dict[str, str]:
    config = phase.config
    share = share_of(strategy, machines.count, config.batch_size, config.micro_batch_size)
    parts = memory(needs, share, machines)
    computing, waiting = step_time(needs, share, machines)
    step, total = computing + waiting, sum(parts.values()) / GIB
    most = largest_piece(needs, share, machines)
    return {
        "ranks": f"{share.ranks:,}",
        "samples of a rank, at once": f"{share.size:,}, {share.piece:,}",
        **{f"GiB {name}": f"{size / GIB:.2f}" for name, size in parts.items()},
        "GiB a rank in all": f"{total:.1f}",
        "fits": "yes" if fits(needs, share, machines) else "no",
        "largest micro_batch_size": f"{most:,}" if most else "none",
        "GB a rank sends in a step": f"{traffic(needs, share, machines) / 1e9:.2f}",
        "step": seconds_text(step),
        "of it waiting for communication": seconds_text(waiting),
        "epoch": duration(step * (num_samples // config.batch_size)),
        "all steps": duration(step * (phase.end_step - phase.begin_step)),
    }


def seconds_text(seconds: float) -> str:
    if seconds >= 100:
        return duration(seconds)
    return f"{seconds:.2f} s" if seconds >= 1 or not seconds else f"{seconds * 1e3:.1f} ms"


def number_text(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _loader(config: TrainConfig, dataset: Dataset, share: RankLoad, machines: Cluster, seconds: float) -> str:
    per_node = share.size * min(share.ranks, machines.per_node) / seconds
    height, width = image_size(config)
    pixels = dataset.channels * config.num_frames * height * width
    text = (
        f"loader      {number_text(per_node)} samples/s a node, {number_text(per_node * pixels / 1e6)} MB/s of pixels"
    )
    size = mean_file_size(dataset)
    if size is None:
        return text
    return f"{text}, {number_text(per_node * size / 1e6)} MB/s from disk (files of {number_text(size / 1e3)} kB)"


def mean_file_size(dataset: Dataset) -> float | None:
    """Bytes of the files that samples come from, by some of them; None where a sample is not a file."""
    places = range(0, len(dataset), max(1, len(dataset) // FILES))
    files = [Path(dataset.describe(index)) for index in places]
    return statistics.fmean(file.stat().st_size for file in files) if all(file.is_file() for file in files) else None


def _checkpoint(needs: ModelCost) -> str:
    size = needs.checkpoint / 1e9
    return f"checkpoint  {size:,.2f} GB, {seconds_text(size / DISK_GB)} at {DISK_GB:g} GB/s"
