"""Time that a run takes on this machine, from one small batch measured before the first step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from jepa.data.loader import blank_fields
from jepa.evaluation.box_snapshot import DetectionSnapshotter
from jepa.evaluation.frozen import eval_mode
from jepa.evaluation.snapshot import Snapshotter
from jepa.parallel.session import Session
from jepa.reports.charts import number
from jepa.reports.console import header_line
from jepa.reports.text import duration
from jepa.seeding import derive_seed, generator
from jepa.training.loop import Plan, TrainComponents
from jepa.types import Batch, Dataset

QUICK_RUN = "for a quick look: jepa-train experiment=quickstart"
LONG_SECONDS = 900
"""Duration of a run above which QUICK_RUN is printed."""
SLOW_SECONDS = 0.5
"""Duration of a pass with few samples above which it is not measured with more."""
REPEATS, REPEAT_SECONDS = 3, 1.5
"""Number of times that a pass is measured, and the total duration after which it is not repeated."""


def describe_cost(
    plan: Plan, components: TrainComponents, snapshotter: Snapshotter | DetectionSnapshotter, dataset: Dataset
) -> str:
    """The lines of the header on data, model and plan, with how long a phase takes here; all ranks call it."""
    num_steps, session = plan.end_step - plan.begin_step, components.session
    encoder = sum(p.numel() for p in components.objective.backbone.parameters())
    trained = sum(p.numel() for group in components.optimizer.param_groups for p in group["params"])
    channels, frames, height, width = components.objective.backbone.clip_shape
    classes = f" in {len(dataset.classes)} classes" if dataset.classes else " without labels"
    clip = (
        f"{frames} frames of " * (frames > 1) + f"{height} x {width} pixels, {channels} channel{'s' * (channels > 1)}"
    )
    ranks = "" if session.is_single else f"{session.world_size} processes with {session.strategy}, each "
    where = f"{ranks}on {session.device.type if ranks else session.device} in {'bf16' if session.bf16 else 'fp32'}"
    train_seconds, eval_seconds = _seconds_per_sample(plan, components)
    training = train_seconds * plan.batch_size / session.world_size * num_steps
    evaluation = eval_seconds * snapshotter.num_samples
    num_evaluations = 1 + math.ceil(num_steps / plan.eval_every) if snapshotter.has_evaluators else 0
    evaluations = f" and {num_evaluations} evaluations of {duration(evaluation)}" if num_evaluations else ""
    lines = [
        header_line("data", f"{plan.dataset_size:,} training samples{classes}; the model sees {clip}"),
        header_line("model", f"{number(encoder)} parameters in the encoder, {number(trained)} trained; {where}"),
        header_line(
            "plan",
            f"{num_steps:,} steps of {plan.batch_size} samples ({plan.position(num_steps)['epoch']:.3g} epochs): about "
            f"{duration(training)} of training{evaluations}",
        ),
    ]
    return "\n".join(lines + [QUICK_RUN] * (training + num_evaluations * evaluation > LONG_SECONDS))


def _seconds_per_sample(plan: Plan, components: TrainComponents) -> tuple[float, float]:
    """Seconds of forward and backward pass, and of the encoder alone; weights do not change."""
    few = min(4, plan.micro_batch_size)
    seconds = _measure(plan, components, few)
    if few == plan.micro_batch_size or max(seconds) > SLOW_SECONDS:
        return seconds[0] / few, seconds[1] / few
    seconds = _measure(plan, components, plan.micro_batch_size)
    return seconds[0] / plan.micro_batch_size, seconds[1] / plan.micro_batch_size


def _measure(plan: Plan, components: TrainComponents, size: int) -> tuple[float, float]:
    with passes(plan, components, size) as (train, encode):
        trained = _seconds(train, components.session)
        if components.session.strategy == "fsdp":
            return trained, trained / 3  # shards are gathered in a step only, of which the forward pass is a third
        return trained, _seconds(encode, components.session)


@contextmanager
def passes(
    plan: Plan, components: TrainComponents, size: int
) -> Iterator[tuple[Callable[[], None], Callable[[], None]]]:
    """A forward and backward pass of a blank batch, and one of the encoder alone, which change nothing."""
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

    encoder = components.objective.detect or components.objective.backbone  # a detector is evaluated as a whole

    def encode() -> None:
        with eval_mode(components.objective), torch.no_grad(), components.session.autocast():
            encoder(batch.clips[:size])

    torch.manual_seed(derive_seed(plan.seed, 0, 0, "cost"))
    with kept_buffers(components.objective):
        yield train, encode


@contextmanager
def kept_buffers(module: nn.Module) -> Iterator[None]:
    """Restore all buffers after the block, also those that no checkpoint holds, such as sums since the last step."""
    before = [
        (part, name, value.clone()) for part in module.modules() for name, value in part.named_buffers(recurse=False)
    ]
    yield
    for part, name, value in before:
        setattr(part, name, value)


def _seconds(work: Callable[[], None], session: Session) -> float:
    """The shortest of several times: the first includes the warm-up, any may be disturbed by other processes."""
    spent: list[float] = []
    synchronize = torch.cuda.synchronize if session.device.type == "cuda" else lambda device: None
    while not spent or (len(spent) < REPEATS and sum(spent) < REPEAT_SECONDS):
        synchronize(session.device)
        begun = time.perf_counter()
        work()
        synchronize(session.device)
        spent.append(max(session.gather(time.perf_counter() - begun)))
    return min(spent)
