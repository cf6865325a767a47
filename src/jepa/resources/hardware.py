"""What runs take on hardware that is not there: memory, traffic and time, by arithmetic alone. Imports no torch.

Everything here is calculated; docs/SCALING.md states the formulas and where they come from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

GIB = 2**30
FLOAT, HALF = 4, 2
"""bytes of a float32 and a bfloat16"""
USABLE = 0.95
"""of the memory; the rest is lost to what lies between the blocks of the allocator"""
LINK_SHARE = 0.8
"""of the nominal rate of a link, reached by large messages"""
DISK_GB = 1.0
"""per second, that checkpoints are written at"""
STRATEGIES = ("single", "ddp", "fsdp")


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """Peaks of the data sheets: dense, without sparsity; links in one direction."""

    tflops: float
    """bfloat16; float32 (as TF32) takes twice as long"""
    memory_gib: float
    """as torch tells it"""
    link_gb: float
    """per second, to the others of the node"""
    network_gb: float
    """per second and GPU, to other nodes"""
    runtime_gib: float = 1.5
    """of the driver's context, the libraries' and the communicators' buffers"""
    slowdown_fp32: float = 2.0


GPUS = {
    "a100": Gpu(tflops=312, memory_gib=79.1, link_gb=300, network_gb=25),
    "a100_40": Gpu(tflops=312, memory_gib=39.4, link_gb=300, network_gb=25),
    "h100": Gpu(tflops=989, memory_gib=79.1, link_gb=450, network_gb=50),
    "h200": Gpu(tflops=989, memory_gib=139.7, link_gb=450, network_gb=50),
    "b200": Gpu(tflops=2250, memory_gib=178.0, link_gb=900, network_gb=50),
    "l40s": Gpu(tflops=362, memory_gib=44.4, link_gb=32, network_gb=12.5),
    "rtx4090": Gpu(tflops=165, memory_gib=23.5, link_gb=16, network_gb=1.25),
    # one core with AVX2; what a process takes before it has a model
    "cpu": Gpu(tflops=0.1, memory_gib=16.0, link_gb=5, network_gb=1.25, runtime_gib=0.75, slowdown_fp32=1.0),
}


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """So many GPUs of a kind, and the rate at which they work."""

    gpu: Gpu
    count: int
    per_node: int
    utilisation: float
    bf16: bool

    @property
    def flops(self) -> float:
        """Of one GPU, per second."""
        return self.gpu.tflops * 1e12 * self.utilisation / (1 if self.bf16 else self.gpu.slowdown_fp32)

    @property
    def num_nodes(self) -> int:
        return math.ceil(self.count / self.per_node)

    @property
    def bus(self) -> float:
        """Bytes per second of a ring through all GPUs: between nodes it uses the network of every GPU of a node."""
        network = self.gpu.network_gb * self.per_node
        return LINK_SHARE * 1e9 * (self.gpu.link_gb if self.num_nodes == 1 else min(self.gpu.link_gb, network))


@dataclass(frozen=True, kw_only=True)
class ModelCost:
    """What one forward and backward pass needs; sizes in bytes, parameters as counts."""

    encoder: int
    trained: int
    frozen: int
    block: int
    """parameters of the largest block"""
    rest: int
    """parameters outside of blocks"""
    state: float
    """of the optimizer, bytes for each trained parameter"""
    forward: float
    """FLOPs of a sample"""
    backward: float
    activations: float
    """of a sample, kept for the backward pass"""
    workspace: float
    """of a sample, more at the worst moment"""
    casts: float
    """bfloat16 copies of weights that autocast keeps for the backward pass"""
    needs_grad_cache: bool = False
    """regularisers see all pieces of a batch, for which each takes another forward pass"""

    @property
    def checkpoint(self) -> float:
        return FLOAT * (self.trained + self.frozen) + self.state * self.trained


@dataclass(frozen=True, kw_only=True)
class RankLoad:
    """What one rank does of a step: `size` samples in pieces of `piece`."""

    strategy: str
    ranks: int
    size: int
    piece: int

    @property
    def num_micro_batches(self) -> int:
        return math.ceil(self.size / self.piece)


def rank_load(strategy: str, count: int, batch_size: int, piece: int | None) -> RankLoad:
    """`single` does the whole batch on one GPU."""
    ranks = 1 if strategy == "single" else count
    size = batch_size // ranks
    return RankLoad(strategy=strategy, ranks=ranks, size=size, piece=min(piece or size, size))


def memory(needs: ModelCost, share: RankLoad, machines: Cluster) -> dict[str, float]:
    """Bytes on one rank, by part; they stand at once when a backward pass begins after an earlier piece's.

    FSDP: three blocks in the dtype of the forward pass (computed, next, and the buffer that gathers it) and two in
    float32 (a gradient, and the buffer that reduces it) are whole, and what is outside of blocks.
    """
    is_sharded = share.strategy == "fsdp"
    ranks = share.ranks if is_sharded else 1
    width = HALF if machines.bf16 else FLOAT
    gathered = width * (3 * needs.block + needs.rest) + FLOAT * 2 * needs.block
    return {
        "weights": FLOAT * needs.trained / ranks,
        "target encoder": FLOAT * needs.frozen / ranks,
        "gradients": FLOAT * needs.trained / ranks,
        "optimizer": needs.state * needs.trained / ranks,
        "weights in bf16": 0.0 if is_sharded else needs.casts,
        "activations": needs.activations * share.piece,
        "workspace": needs.workspace * share.piece,
        "communication": gathered if is_sharded else 0.0,
        "runtime": machines.gpu.runtime_gib * GIB,
    }


def largest_micro_batch(needs: ModelCost, share: RankLoad, machines: Cluster, most: int | None = None) -> int:
    """The most samples in a forward pass that fit, of those that divide the rank's share; 0 where one is too many."""
    sizes = [size for size in range(1, (most or share.size) + 1) if share.size % size == 0]
    return max((size for size in sizes if fits(needs, replace(share, piece=size), machines)), default=0)


def fits(needs: ModelCost, share: RankLoad, machines: Cluster) -> bool:
    return sum(memory(needs, share, machines).values()) <= USABLE * machines.gpu.memory_gib * GIB


def gather_bytes(needs: ModelCost, share: RankLoad, machines: Cluster) -> tuple[float, float]:
    """Bytes that a rank sends in the forward and in the backward pass of one piece under FSDP.

    All parameters are gathered before the forward pass, the trained ones again before the backward pass, and float32
    gradients are reduced after it; each moves (N - 1) / N of its size (ring).
    """
    moved, width = (share.ranks - 1) / share.ranks, HALF if machines.bf16 else FLOAT
    forward = moved * width * (needs.trained + needs.frozen)
    return forward, moved * (width + FLOAT) * needs.trained


def traffic(needs: ModelCost, share: RankLoad, machines: Cluster) -> float:
    """Bytes that a rank sends in a step: DDP reduces float32 gradients once, 2 (N - 1) / N of their size (ring)."""
    if share.strategy == "fsdp":
        return share.num_micro_batches * sum(gather_bytes(needs, share, machines))
    return 2 * (share.ranks - 1) / share.ranks * FLOAT * needs.trained


def step_time(needs: ModelCost, share: RankLoad, machines: Cluster) -> tuple[float, float]:
    """Seconds of computing, and of communication that no computing hides.

    DDP hides it behind the backward pass of the last piece, FSDP what is gathered for each pass behind that pass.
    """
    forward, backward = (share.piece * work / machines.flops for work in (needs.forward, needs.backward))
    extra = forward if needs.needs_grad_cache and share.num_micro_batches > 1 else 0.0
    computing = share.size / share.piece * (forward + backward + extra)
    if share.strategy == "fsdp":
        sent = gather_bytes(needs, share, machines)
        late = [max(0.0, part / machines.bus - work) for part, work in zip(sent, (forward, backward), strict=True)]
        return computing, share.num_micro_batches * sum(late)
    return computing, max(0.0, traffic(needs, share, machines) / machines.bus - backward)
