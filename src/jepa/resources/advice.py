"""Advice when memory runs out: which keys to change, and how much memory the run would then take."""

from __future__ import annotations

from dataclasses import replace

from jepa.config import TrainConfig
from jepa.parallel.session import Session
from jepa.resources.estimate import UNTRACEABLE, FakeModel
from jepa.resources.hardware import GIB, GPUS, Cluster, RankLoad, fits, largest_micro_batch, memory, rank_load
from jepa.types import Dataset

CHECKPOINTING = "checkpoint_activations"


def memory_advice(config: TrainConfig, dataset: Dataset, session: Session, device_bytes: float) -> str:
    """One sentence: the keys to change, their new values, and the estimated memory of a rank with each change.

    `config` is that of the phase. If the model cannot run on fake tensors, the sentence has no numbers; never raises.
    """
    load = rank_load(session.strategy, session.world_size, config.batch_size, config.micro_batch_size)
    gpu = replace(GPUS["cpu" if session.device.type == "cpu" else "h100"], memory_gib=device_bytes / GIB)
    cluster = Cluster(gpu=gpu, count=session.world_size, per_node=8, utilisation=1.0, bf16=session.bf16)
    if session.world_size > 1:
        config = replace(config, regularizer={})  # regularisers would wait for the other ranks
    try:
        return _with_numbers(config, dataset, load, cluster)
    except (*UNTRACEABLE, ValueError):
        keys = [f"micro_batch_size={load.micro_batch_size // 2}"] if load.micro_batch_size > 1 else []
        keys += ["precision=bf16"] if _may_be_bf16(cluster) else []
        keys += [f"encoder.{CHECKPOINTING}=true"] if _may_checkpoint(config) else []
        keys += ["strategy=fsdp"] if load.strategy == "ddp" else []
        return f"out of memory: try {_either([*keys, 'a smaller encoder or image_size'])}"


def _with_numbers(config: TrainConfig, dataset: Dataset, load: RankLoad, cluster: Cluster) -> str:
    model, samples = FakeModel(config, dataset), load.micro_batch_size
    cost = model.cost(samples, bf16=cluster.bf16, backward=False)
    options = {}
    if samples > 1:
        size = largest_micro_batch(cost, load, cluster, most=samples // 2) or 1
        options[f"micro_batch_size={size} (same result, "] = cost, replace(load, micro_batch_size=size), cluster
    if _may_be_bf16(cluster):
        bf16_cost = model.cost(samples, bf16=True, backward=False)
        options["precision=bf16 ("] = bf16_cost, load, replace(cluster, bf16=True)
    if _may_checkpoint(config):
        for module in model.objective.modules():
            if hasattr(module, CHECKPOINTING):
                setattr(module, CHECKPOINTING, True)
        checkpointed = model.cost(samples, bf16=cluster.bf16, backward=False)
        recomputed = (cost.activations - checkpointed.activations) / (config.encoder.get("depth") or 1)  # of one block
        checkpointed = replace(checkpointed, workspace=checkpointed.workspace + recomputed)
        options[f"encoder.{CHECKPOINTING}=true ("] = checkpointed, load, cluster
    if load.strategy == "ddp":
        options["strategy=fsdp ("] = cost, replace(load, strategy="fsdp"), cluster
    before, total = sum(memory(cost, load, cluster).values()) / GIB, cluster.gpu.memory_gib
    after = {change: sum(memory(*setup).values()) / GIB for change, setup in options.items()}
    changes = [f"{change}{gib:.1f} GiB)" for change, gib in after.items() if gib < before]
    if not any(fits(*setup) for setup in options.values()):
        changes.append("several of these with a smaller encoder or image_size, since none alone is enough")
    return f"out of memory: a rank takes {before:.1f} of {total:.1f} GiB by the estimate; use {_either(changes)}"


def _may_be_bf16(cluster: Cluster) -> bool:
    return not cluster.bf16 and cluster.gpu.slowdown_fp32 > 1


def _may_checkpoint(config: TrainConfig) -> bool:
    return config.encoder.get(CHECKPOINTING) is False


def _either(changes: list[str]) -> str:
    return f"{', '.join(changes[:-1])} or {changes[-1]}" if len(changes) > 1 else changes[0]
