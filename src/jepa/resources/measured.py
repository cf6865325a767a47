"""What a run will cost on this machine: one small batch, measured before the first step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

from jepa.data.loader import blank_fields
from jepa.evaluation.box_snapshot import DetectionSnapshotter
from jepa.evaluation.frozen import evaluating
from jepa.evaluation.snapshot import Snapshotter
from jepa.parallel.session import Session
from jepa.seeding import derive_seed, generator
from jepa.training.loop import Plan, TrainComponents
from jepa.training.progress import duration
from jepa.types import Batch

QUICK_LOOK = "for a quick look: jepa-train experiment=quickstart"
PATIENCE_SECONDS = 900
PATIENCE_FOR_ONE = 0.5
GOES, PATIENCE_FOR_GOES = 3, 1.5
"""how often a step is timed, and the seconds after which it is not timed again"""


def describe_cost(plan: Plan, components: TrainComponents, snapshotter: Snapshotter | DetectionSnapshotter) -> str:
    """Two lines for a person: what is trained, and how long it takes here, of one phase; all ranks call it."""
    num_steps, session = plan.end_step - plan.begin_step, components.session
    encoder = _millions(components.objective.backbone)
    everything = sum(p.numel() for group in components.optimizer.param_groups for p in group["params"]) / 1e6
    samples = plan.position(num_steps)
    precision = "bf16" if session.bf16 else "fp32"
    lines = [
        f"{encoder:.1f} M parameters in the encoder, {everything:.1f} M trained; {plan.dataset_size:,} samples, "
        f"batch {plan.batch_size}, {num_steps:,} steps ({samples['epoch']:.1f} epochs)",
    ]
    ranks = "" if session.is_single else f"{session.world_size} processes with {session.strategy}, each "
    where = f"{ranks}on {session.device.type if ranks else session.device} in {precision}"
    trained, judged = _seconds_per_sample(plan, components)
    training = trained * plan.batch_size / session.world_size * num_steps
    evaluation = judged * snapshotter.num_samples
    num_evaluations = 1 + math.ceil(num_steps / plan.eval_every) if snapshotter.has_evaluators else 0
    judging = f" and {num_evaluations} evaluations of {duration(evaluation)}" if num_evaluations else ""
    lines.append(f"{where}: about {duration(training)} of training{judging}")
    if training + num_evaluations * evaluation > PATIENCE_SECONDS:
        lines.append(QUICK_LOOK)
    return "\n".join(lines)


def _seconds_per_sample(plan: Plan, components: TrainComponents) -> tuple[float, float]:
    """Of a training step without the optimizer's part, and of the encoder alone; weights and gradients stay.

    Four samples tell enough where they take long; otherwise as many as a step has.
    """
    few = min(4, plan.micro_batch_size)
    seconds = _measure(plan, components, few)
    size = few if max(seconds) > PATIENCE_FOR_ONE else plan.micro_batch_size
    trained, judged = seconds if size == few else _measure(plan, components, size)
    return trained / size, judged / size


def _measure(plan: Plan, components: TrainComponents, size: int) -> tuple[float, float]:
    device, shape = components.session.device, components.objective.backbone.clip_shape
    views, rows = components.augment.views, size * components.augment.views
    masks = components.masker(rows, generator(plan.seed, 0, 0, "cost")).map(lambda indices: indices.to(device))
    num_local = size * components.augment.local_views
    local = torch.zeros(num_local, *shape[:2], *components.augment.local_size, device=device) if num_local else None
    fields = {name: field.to(device) for name, field in blank_fields(components.fields, rows).items()}
    batch = Batch(torch.zeros(rows, *shape, device=device), fields, views, local)

    def train() -> None:
        with components.session.autocast():
            loss = components.objective(batch, masks).loss
        loss.backward()
        components.optimizer.zero_grad(set_to_none=True)

    look = components.objective.detect or components.objective.backbone  # a detector is judged by what it finds

    def encode() -> None:
        with evaluating(components.objective), torch.no_grad(), components.session.autocast():
            look(batch.clips[:size])

    torch.manual_seed(derive_seed(plan.seed, 0, 0, "cost"))
    trained = _seconds(train, components.session)
    if components.session.strategy == "fsdp":
        return trained, trained / 3  # the encoder's shards are put together in a step alone; its forward is the third
    return trained, _seconds(encode, components.session)


def _seconds(work: Callable[[], None], session: Session) -> float:
    """The shortest of a few goes, of which the first warms up and any may be held up by others on the machine."""
    spent: list[float] = []
    while not spent or (len(spent) < GOES and sum(spent) < PATIENCE_FOR_GOES):
        _synchronize(session.device)
        begun = time.perf_counter()
        work()
        _synchronize(session.device)
        spent.append(max(session.gather(time.perf_counter() - begun)))
    return min(spent)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _millions(module: torch.nn.Module) -> float:
    return sum(p.numel() for p in module.parameters()) / 1e6
