"""The tables of docs/SCALING.md: `python scripts/scaling.py`; calculated, only the drawing of masks is measured."""

from __future__ import annotations

import time
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch

from jepa.config import TrainConfig, compose, factory
from jepa.resources.estimate import FakeModel, model_cost, seconds_text
from jepa.resources.hardware import (
    GIB,
    GPUS,
    Cluster,
    ModelCost,
    fits,
    largest_micro_batch,
    memory,
    rank_load,
    step_time,
    traffic,
)
from jepa.seeding import generator

IMAGES = ["experiment=ijepa_vith14_in1k", "dataset=shapes"]
CLIPS = ["experiment=vjepa2_vitl16", "dataset.root_path=.", "dataset.video_folder=.", "phases=[]"]
MODELS = {
    "ViT-L/16, 224 px": [*IMAGES, "size=large", "encoder.patch_size=16"],
    "ViT-H/14, 224 px": IMAGES,
    "ViT-g/16, 224 px": [*IMAGES, "size=giant", "encoder.patch_size=16"],
    "ViT-L/16, 16 frames of 256 px": CLIPS,
}
COUNTS = (8, 64, 256, 1024)
DATA: Any = SimpleNamespace(channels=3)


def main() -> None:
    cost = {name: model_cost(compose(overrides), DATA, 16, bf16=True) for name, overrides in MODELS.items()}
    print(models(cost), memories(cost), steps(cost), loaders(cost), masks(), sep="\n\n")


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def h100(count: int) -> Cluster:
    return Cluster(gpu=GPUS["h100"], count=count, per_node=8, utilisation=0.4, bf16=True)


def global_batch(count: int) -> int:
    return max(2048, 16 * count)


def models(cost: dict[str, ModelCost]) -> str:
    head = ["model", "trained", "target encoder", "GFLOPs per sample", "checkpoint, GB", "save at 1 GB/s"]
    rows = []
    for name, need in cost.items():
        work, size = (need.forward + need.backward) / 1e9, need.checkpoint / 1e9
        sizes = [f"{need.trained / 1e6:,.0f} M", f"{need.frozen / 1e6:,.0f} M", f"{work:,.0f}", f"{size:.1f}"]
        rows.append([name, *sizes, f"{size:.0f} s"])
    return table(head, rows)


def memories(cost: dict[str, ModelCost]) -> str:
    """Without activations, and how many samples fit beside them."""
    head = [
        "model",
        "strategy",
        *(f"{count} GPUs" for count in COUNTS),
        "each further sample",
        "micro-batch in 80, 40, 24 GB",
    ]
    rows = []
    for name, need in cost.items():
        for strategy in ("ddp", "fsdp"):
            cells = []
            for count in COUNTS:
                parts = memory(need, rank_load(strategy, count, count, 1), h100(count))
                parts["activations"] = parts["workspace"] = 0.0
                cells.append(f"{sum(parts.values()) / GIB:.1f}")
            each = f"{(need.activations + need.workspace) / GIB:.3f}"
            rows.append([name, strategy, *cells, each, ", ".join(most(need, strategy, gpu) for gpu in GPU_SIZES)])
    return table(head, rows)


GPU_SIZES = ("h100", "a100_40", "rtx4090")


def most(need: ModelCost, strategy: str, gpu: str) -> str:
    """The largest micro-batch on one of 8 GPUs, a power of two."""
    cluster = Cluster(gpu=GPUS[gpu], count=8, per_node=8, utilisation=0.4, bf16=True)
    return str(largest_micro_batch(need, rank_load(strategy, 8, 8 * 1024, None), cluster) or "none")


def steps(cost: dict[str, ModelCost]) -> str:
    head = ["model", "GPUs", "batch", "micro-batch", "computing", "ddp: GB sent, waiting", "fsdp: GB sent, waiting"]
    rows = []
    for name, need in cost.items():
        for count in COUNTS:
            cluster, cells = h100(count), []
            size = largest_micro_batch(need, rank_load("fsdp", count, global_batch(count), None), cluster)
            for strategy in ("ddp", "fsdp"):
                load = rank_load(strategy, count, global_batch(count), size)
                computing, waiting = step_time(need, load, cluster)
                sent = f"{traffic(need, load, cluster) / 1e9:.1f}, {seconds_text(waiting) if waiting else '0'}"
                cells.append(sent if fits(need, load, cluster) else f"{sent} (does not fit)")
            rows.append([name, str(count), f"{global_batch(count):,}", str(size), seconds_text(computing), *cells])
    return table(head, rows)


def loaders(cost: dict[str, ModelCost]) -> str:
    head = ["model", "samples/s per node of 8 H100", "MB/s of decoded pixels"]
    rows = []
    for name, need in cost.items():
        config: TrainConfig = compose(MODELS[name])
        rate = 8 * h100(8).flops / (need.forward + need.backward)
        pixels = 3 * config.num_frames * config.image_size**2
        rows.append([name, f"{rate:,.0f}", f"{rate * pixels / 1e6:,.0f}"])
    return table(head, rows)


def masks() -> str:
    """In turns: all rows of a batch, as one process draws them, and those of one rank of many."""
    head = ["masks", "batch", "GPUs", "ms for the whole batch", "ms for the rows of one rank"]
    rows = []
    for name in ("ViT-H/14, 224 px", "ViT-L/16, 16 frames of 256 px"):
        config = compose(MODELS[name])
        masker = factory(config.mask)(grid=FakeModel(config, DATA).objective.backbone.grid)
        for count in COUNTS[1:]:
            size = global_batch(count)
            own, spent = torch.arange(0, size, count), []
            for step in range(3):
                times = [time.perf_counter()]
                for part in (None, own):
                    masker(size, generator(0, step, 0, "masks"), part)
                    times.append(time.perf_counter())
                spent.append([1e3 * (end - begin) for begin, end in pairwise(times)])
            whole, load = (min(column) for column in zip(*spent, strict=True))
            rows.append([f"{type(masker).__name__}, {name}", f"{size:,}", str(count), f"{whole:,.0f}", f"{load:,.1f}"])
    return table(head, rows)


if __name__ == "__main__":
    main()
