"""What to change when the memory of a device has run out, with the memory that each change would take."""

from __future__ import annotations

from dataclasses import replace

from jepa.config import TrainConfig
from jepa.parallel.session import Session
from jepa.resources.estimate import UNTRACEABLE, make_fake_model
from jepa.resources.hardware import (
    GIB,
    GPUS,
    Cluster,
    ModelCost,
    RankLoad,
    fits,
    largest_micro_batch,
    memory,
    rank_load,
)
from jepa.types import Dataset

CHECKPOINTING = "checkpoint_activations"


def memory_advice(config: TrainConfig, dataset: Dataset, session: Session, device_bytes: float) -> str:
    """One sentence: which keys to change to which values, and the memory that a rank would take by the estimate.

    `config` is that of the phase. Without numbers where the model cannot be run without its own; never raises.
    """
    share = rank_load(session.strategy, session.world_size, config.batch_size, config.micro_batch_size)
    gpu = replace(GPUS["cpu" if session.device.type == "cpu" else "h100"], memory_gib=device_bytes / GIB)
    machines = Cluster(gpu=gpu, count=session.world_size, per_node=8, utilisation=1.0, bf16=session.bf16)
    if session.world_size > 1:
        config = replace(config, regularizer={})  # which would wait for the other ranks
    try:
        return _with_numbers(config, dataset, share, machines)
    except (*UNTRACEABLE, ValueError):
        keys = [f"micro_batch_size={share.piece // 2}"] if share.piece > 1 else []
        keys += ["precision=bf16"] if _may_be_bf16(machines) else []
        keys += [f"encoder.{CHECKPOINTING}=true"] if _may_checkpoint(config) else []
        keys += ["strategy=fsdp"] if share.strategy == "ddp" else []
        return f"out of memory: try {_either([*keys, 'a smaller encoder or image_size'])}"


def _with_numbers(config: TrainConfig, dataset: Dataset, share: RankLoad, machines: Cluster) -> str:
    model = make_fake_model(config, dataset)
    needs = model.needs(config, share.piece, bf16=machines.bf16, backward=False)
    options: list[tuple[str, tuple[ModelCost, RankLoad, Cluster]]] = []
    if share.piece > 1:
        piece = largest_micro_batch(needs, share, machines, most=share.piece // 2) or 1
        options.append((f"micro_batch_size={piece} (same result, ", (needs, replace(share, piece=piece), machines)))
    if _may_be_bf16(machines):
        halved = model.needs(config, share.piece, bf16=True, backward=False)
        options.append(("precision=bf16 (", (halved, share, replace(machines, bf16=True))))
    if _may_checkpoint(config):
        for module in model.objective.modules():
            if hasattr(module, CHECKPOINTING):
                setattr(module, CHECKPOINTING, True)
        kept = model.needs(config, share.piece, bf16=machines.bf16, backward=False)
        one_block = (needs.activations - kept.activations) / config.encoder.get("depth", 1)  # is computed again at once
        kept = replace(kept, workspace=kept.workspace + one_block)
        options.append((f"encoder.{CHECKPOINTING}=true (", (kept, share, machines)))
    if share.strategy == "ddp":
        options.append(("strategy=fsdp (", (needs, replace(share, strategy="fsdp"), machines)))
    before, total = _gib(needs, share, machines), machines.gpu.memory_gib
    said = [f"{key}{_gib(*rest):.1f} GiB)" for key, rest in options if _gib(*rest) < before]
    if not any(fits(*rest) for _, rest in options):
        said.append("several of these with a smaller encoder or image_size, since none alone is enough")
    return f"out of memory: a rank takes {before:.1f} of {total:.1f} GiB by the estimate; use {_either(said)}"


def _may_be_bf16(machines: Cluster) -> bool:
    return not machines.bf16 and machines.gpu.slowdown_fp32 > 1


def _may_checkpoint(config: TrainConfig) -> bool:
    return config.encoder.get(CHECKPOINTING) is False


def _gib(needs: ModelCost, share: RankLoad, machines: Cluster) -> float:
    return sum(memory(needs, share, machines).values()) / GIB


def _either(words: list[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}" if len(words) > 1 else words[0]
