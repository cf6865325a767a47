"""Memory, traffic and time of a run on given hardware, calculated by the formulas of docs/SCALING.md. Without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

GIB = 2**30
FLOAT, HALF = 4, 2
"""Bytes of a float32 and a bfloat16."""
USABLE = 0.95
"""Usable fraction of GPU memory (allocator fragmentation)."""
LINK_SHARE = 0.8
"""Fraction of the nominal rate of a link that large messages reach."""
DISK_GB = 1.0
"""Rate at which checkpoints are written, in GB per second."""
STRATEGIES = ("single", "ddp", "fsdp")


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """Peak rates of the data sheets, without sparsity; those of links are in one direction."""

    tflops: float
    """TFLOP/s in bfloat16."""
    memory_gib: float
    """Total memory as torch reports it."""
    link_gb: float
    """GB per second to the other GPUs of the node."""
    network_gb: float
    """GB per second and GPU to other nodes."""
    runtime_gib: float = 1.5
    """Memory of the driver's context and of the buffers of libraries and communicators."""
    slowdown_fp32: float = 2.0
    """Time in float32 (as TF32) relative to bfloat16."""


GPUS = {
    "a100": Gpu(tflops=312, memory_gib=79.1, link_gb=300, network_gb=25),
    "a100_40": Gpu(tflops=312, memory_gib=39.4, link_gb=300, network_gb=25),
    "h100": Gpu(tflops=989, memory_gib=79.1, link_gb=450, network_gb=50),
    "h200": Gpu(tflops=989, memory_gib=139.7, link_gb=450, network_gb=50),
    "b200": Gpu(tflops=2250, memory_gib=178.0, link_gb=900, network_gb=50),
    "l40s": Gpu(tflops=362, memory_gib=44.4, link_gb=32, network_gb=12.5),
    "rtx4090": Gpu(tflops=165, memory_gib=23.5, link_gb=16, network_gb=1.25),
    # One core with AVX2; runtime_gib is the memory of a process without a model.
    "cpu": Gpu(tflops=0.1, memory_gib=16.0, link_gb=5, network_gb=1.25, runtime_gib=0.75, slowdown_fp32=1.0),
}


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """`count` GPUs of one kind; `utilisation` is the fraction of their peak rate that a model reaches."""

    gpu: Gpu
    count: int
    per_node: int
    utilisation: float
    bf16: bool

    @property
    def flops(self) -> float:
        """FLOP/s of one GPU."""
        return self.gpu.tflops * 1e12 * self.utilisation / (1 if self.bf16 else self.gpu.slowdown_fp32)

    @property
    def num_nodes(self) -> int:
        return math.ceil(self.count / self.per_node)

    @property
    def bus(self) -> float:
        """Bytes per second of a ring through all GPUs, which shares the network of all GPUs of a node."""
        network = self.gpu.network_gb * self.per_node
        return LINK_SHARE * 1e9 * (self.gpu.link_gb if self.num_nodes == 1 else min(self.gpu.link_gb, network))


def most_seconds(parameters: int, tokens: int, samples: int, cluster: Cluster) -> float:
    """Upper bound of the training of an encoder, before a model is built.

    All tokens pass the encoder forward and backward, and a target encoder forward: 8 FLOPs for each parameter of the
    blocks. `estimate=true` counts at the same rate what the method really needs, which is less where tokens are hidden.
    """
    return 8 * parameters * tokens * samples / (cluster.flops * cluster.count)


@dataclass(frozen=True, kw_only=True)
class ModelCost:
    """Parameters (counts), memory (bytes) and FLOPs of a forward and a backward pass."""

    encoder: int
    trained: int
    frozen: int
    block: int
    """Parameters of the largest block."""
    outside_blocks: int
    """Parameters outside of all blocks."""
    state: float
    """Bytes of optimizer state per trained parameter."""
    forward: float
    """FLOPs per sample; so is `backward`."""
    backward: float
    activations: float
    """Bytes per sample stored for the backward pass."""
    workspace: float
    """Bytes per sample beyond the activations at the peak."""
    casts: float
    """Bytes of the bfloat16 copies of weights that autocast stores for the backward pass."""
    needs_grad_cache: bool = False
    """True if regularisers see all micro-batches of a batch, which takes another forward pass."""

    @property
    def checkpoint(self) -> float:
        """Bytes of a checkpoint."""
        return FLOAT * (self.trained + self.frozen) + self.state * self.trained


@dataclass(frozen=True)
class RankLoad:
    """A rank's part of a step: `samples` in forward passes of `micro_batch_size`."""

    strategy: str
    ranks: int
    samples: int
    micro_batch_size: int

    @property
    def num_micro_batches(self) -> int:
        return math.ceil(self.samples / self.micro_batch_size)


def rank_load(strategy: str, count: int, batch_size: int, micro_batch_size: int | None) -> RankLoad:
    """The load of each of `count` GPUs; `single` trains the whole batch on one."""
    ranks = 1 if strategy == "single" else count
    samples = batch_size // ranks
    return RankLoad(strategy, ranks, samples, min(micro_batch_size or samples, samples))


def memory(cost: ModelCost, load: RankLoad, cluster: Cluster) -> dict[str, float]:
    """Bytes on one rank by kind, at the beginning of the backward pass of a micro-batch after the first.

    Unsharded with FSDP: three blocks in the dtype of the forward pass (this one, the next, and the buffer that gathers
    it), two in float32 (a gradient, and the buffer that reduces it), and the parameters outside of blocks.
    """
    is_sharded = load.strategy == "fsdp"
    ranks = load.ranks if is_sharded else 1
    width = HALF if cluster.bf16 else FLOAT
    gathered = width * (3 * cost.block + cost.outside_blocks) + FLOAT * 2 * cost.block
    return {
        "weights": FLOAT * cost.trained / ranks, "target encoder": FLOAT * cost.frozen / ranks,
        "gradients": FLOAT * cost.trained / ranks, "optimizer": cost.state * cost.trained / ranks,
        "weights in bf16": 0.0 if is_sharded else cost.casts, "activations": cost.activations * load.micro_batch_size,
        "workspace": cost.workspace * load.micro_batch_size, "communication": gathered if is_sharded else 0.0,
        "runtime": cluster.gpu.runtime_gib * GIB,
    }  # fmt: skip


def largest_micro_batch(cost: ModelCost, load: RankLoad, cluster: Cluster, most: int | None = None) -> int:
    """The largest divisor of the rank's samples, up to `most`, that fits as a micro-batch; 0 if not even 1 fits."""
    sizes = [size for size in range(1, (most or load.samples) + 1) if load.samples % size == 0]
    return max((size for size in sizes if fits(cost, replace(load, micro_batch_size=size), cluster)), default=0)


def fits(cost: ModelCost, load: RankLoad, cluster: Cluster) -> bool:
    return sum(memory(cost, load, cluster).values()) <= USABLE * cluster.gpu.memory_gib * GIB


def gather_bytes(cost: ModelCost, load: RankLoad, cluster: Cluster) -> tuple[float, float]:
    """Bytes that a rank sends in the forward and in the backward pass of one micro-batch with FSDP.

    All parameters are gathered before the forward pass, the trained ones again before the backward pass, and float32
    gradients are reduced after it; each moves (N - 1) / N of its size (ring).
    """
    ring, width = (load.ranks - 1) / load.ranks, HALF if cluster.bf16 else FLOAT
    return ring * width * (cost.trained + cost.frozen), ring * (width + FLOAT) * cost.trained


def traffic(cost: ModelCost, load: RankLoad, cluster: Cluster) -> float:
    """Bytes that a rank sends in a step: DDP reduces float32 gradients once, 2 (N - 1) / N of their size (ring)."""
    if load.strategy == "fsdp":
        return load.num_micro_batches * sum(gather_bytes(cost, load, cluster))
    return 2 * (load.ranks - 1) / load.ranks * FLOAT * cost.trained


def step_time(cost: ModelCost, load: RankLoad, cluster: Cluster) -> tuple[float, float]:
    """Seconds of computing, and of communication that does not overlap with it.

    DDP overlaps it with the backward pass of the last micro-batch, FSDP the gathering for each pass with that pass.
    """
    forward, backward = (load.micro_batch_size * flops / cluster.flops for flops in (cost.forward, cost.backward))
    extra = forward if cost.needs_grad_cache and load.num_micro_batches > 1 else 0.0
    computing = load.samples / load.micro_batch_size * (forward + backward + extra)
    if load.strategy == "fsdp":
        passes = zip(gather_bytes(cost, load, cluster), (forward, backward), strict=True)
        return computing, load.num_micro_batches * sum(max(0.0, sent / cluster.bus - busy) for sent, busy in passes)
    return computing, max(0.0, traffic(cost, load, cluster) / cluster.bus - backward)
