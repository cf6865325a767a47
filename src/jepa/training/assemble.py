"""From a checked configuration to a run, in reading order: sizes flow one way, through constructors."""

from __future__ import annotations

import logging
import math
from collections.abc import Generator, Sequence, Set
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import numpy as np
import torch

from jepa.config import ConfigError, TrainConfig, build_with, factory, to_yaml
from jepa.data.box_transforms import BoxAugment, Letterbox
from jepa.data.loader import BrokenSamples, batches
from jepa.data.mixture import MixtureCounter
from jepa.data.transforms import Augment, EvalTransform
from jepa.encoders.names import TABLE
from jepa.evaluation.box_snapshot import DetectionSnapshotter
from jepa.evaluation.snapshot import Snapshotter
from jepa.evaluation.types import Evaluator, Logger
from jepa.layers.attention import choose_attention
from jepa.masks.geometry import local_size
from jepa.objectives.base import Objective
from jepa.optim import parameter_groups
from jepa.parallel.session import Session
from jepa.parallel.strategy import wrap
from jepa.runs import checkpoint
from jepa.runs.folder import RunFolder
from jepa.runs.metrics import FolderLogger
from jepa.seeding import derive_seed
from jepa.suggestions import near_multiples
from jepa.training.loop import Plan, TrainComponents
from jepa.training.run import Run
from jepa.training.step import SpikeGuard
from jepa.types import ClipDataset, Dataset, DatasetTraits, Field, Masker, RawBatch


@dataclass(frozen=True)
class Phase:
    """A stretch of the run with sizes of its own; `config` holds them where the whole configuration has the first."""

    config: TrainConfig
    whole: TrainConfig
    begin_step: int
    end_step: int
    total_steps: int


def split_phases(config: TrainConfig, dataset_size: int) -> list[Phase]:
    """The run in steps, one phase where the configuration names none.

    Raises ConfigError where the data set is smaller than a batch.
    """
    per_epoch = dataset_size // config.batch_size
    if per_epoch == 0:
        fault = f"batch_size={config.batch_size}: the data set has only {dataset_size} samples; lower batch_size"
        raise ConfigError([fault])
    total = config.steps if config.steps is not None else config.epochs * per_epoch
    found, done = [], 0.0
    for number, phase in enumerate(config.phases or [{"share": 1.0}]):
        sizes = {key: value for key, value in phase.items() if key != "share"}
        begin, done = round(done * total), done + phase["share"]
        end = total if number + 1 == len(config.phases) else round(done * total)
        if end <= begin:
            raise ConfigError([f"phases[{number}].share={phase['share']}: has no step in a run of {total}"])
        found.append(Phase(replace(config, **sizes), config, begin, end, total))
    return found


def phases_left(config: TrainConfig, dataset_size: int, folder: Path) -> list[Phase]:
    """Those that the last checkpoint of the folder has not seen the end of; the last one when it has seen all."""
    phases, last = split_phases(config, dataset_size), checkpoint.latest(folder)
    done = checkpoint.peek(last)["step"] if last else 0
    return [phase for phase in phases if phase.end_step > done] or phases[-1:]


def assemble(phase: Phase, dataset: Dataset, folder: Path, session: Session) -> Run:
    """Raises ConfigError or ValueError, naming key and value, for what only the built parts can tell."""
    config = phase.config
    plan = make_plan(phase, len(dataset), session.world_size)
    components = make_components(config, dataset, plan, session)
    check_phases(phase.whole, components.objective.backbone)
    evaluators = [factory(node)() for node in config.evaluator.values()]
    return Run(
        folder=folder,
        plan=plan,
        components=components,
        snapshotter=make_snapshotter(phase, dataset, components, evaluators),
        evaluators=evaluators,
        loggers=(),
        batches=partial(start_batches, config, dataset, plan, components),
        broken=BrokenSamples(dataset),
        shares=MixtureCounter(dataset),
        config_text=to_yaml(phase.whole),
        facts=make_facts(config, dataset, components.objective.backbone),
        writer=checkpoint.Writer(folder, session, keep=config.keep, asynchronous=config.save_async),
        judge=config.evaluation.judge,
    )


def make_snapshotter(
    phase: Phase, dataset: Any, components: TrainComponents, evaluators: Sequence[Evaluator]
) -> Snapshotter | DetectionSnapshotter:
    """What the evaluators look at: of a detector what it finds, of other objectives the features of their backbone."""
    config = phase.config
    evaluation = asdict(config.evaluation)
    wired = {
        "session": components.session,
        "seed": config.seed,
        "evaluators": evaluators,
        **{key: evaluation[key] for key in ("batch_size", "val_samples")},
    }
    if "boxes" in components.fields:
        whole = Letterbox(**picture(config, dataset))
        return DetectionSnapshotter(dataset=dataset, transform=whole, last_step=phase.total_steps, **wired)
    crops = {key: getattr(config.augment, key) for key in ("crop_scale", "crop_aspect", "flip")}
    return Snapshotter(
        dataset=DatasetTraits.of(dataset).probed or dataset,
        transform=EvalTransform(**picture(config, dataset)),
        masker=components.masker,
        crops=partial(Augment, **picture(config, dataset), **crops),
        train_samples=config.evaluation.train_samples,
        still=config.evaluation.still,
        **wired,
    )


def check_phases(config: TrainConfig, encoder: Any) -> None:
    """Raises ConfigError where phases of several sizes would share one table of positions among the weights."""
    sizes = {f"{phase.get('image_size')} {phase.get('num_frames')}" for phase in config.phases}
    if len(sizes) > 1 and TABLE in encoder.state_dict():
        raise ConfigError(["phases: these weights keep positions of one size (position=table); run one size at a time"])


def make_facts(config: TrainConfig, dataset: Dataset, encoder: Any) -> dict[str, Any]:
    """What it takes to build and feed the encoder of a checkpoint, without what its weights once came from."""
    node = getattr(encoder, "node", config.encoder | {"clip_shape": encoder.clip_shape})
    return {"clip_shape": encoder.clip_shape, "mean": dataset.mean, "std": dataset.std, "encoder": node}


def make_dataset(config: TrainConfig) -> Dataset:
    """Data sets of clips are told how many frames a clip has."""
    return build_with(config.dataset, num_frames=config.num_frames)


def make_plan(phase: Phase, dataset_size: int, world_size: int = 1) -> Plan:
    """Everything in steps and samples. Raises ConfigError where the ranks cannot have equal shares of a batch."""
    config, total = phase.config, phase.total_steps
    share, rest = divmod(config.batch_size, world_size)
    if rest:
        near = near_multiples(config.batch_size, world_size)
        raise ConfigError([f"batch_size={config.batch_size}: {world_size} processes share a batch equally; use {near}"])
    return Plan(
        total_steps=total,
        begin_step=phase.begin_step,
        end_step=phase.end_step,
        batch_size=config.batch_size,
        micro_batch_size=min(config.micro_batch_size or share, share),
        dataset_size=dataset_size,
        seed=config.seed,
        log_every=config.log_every,
        eval_every=config.eval_every or math.ceil(total / 5),
        save_every=config.save_every or max(1, min(1000, total // 10)),
        clip_grad=config.clip_grad,
    )


def make_components(config: TrainConfig, dataset: Dataset, plan: Plan, session: Session) -> TrainComponents:
    """All that a training step needs."""
    objective, masker = make_model(config, dataset, plan, session)
    eval_copy = deepcopy(objective).cpu() if session.strategy == "fsdp" and session.is_rank_zero else None
    wrapped = wrap(objective, session, compiled=config.compile)  # before the optimizer: it may change the parameters
    channels, frames, height, width = objective.backbone.clip_shape
    images = torch.empty(1, channels, 1, height, width, device="meta")
    mixes_in_images = frames > 1 and any(not isinstance(part, ClipDataset) for part in DatasetTraits.of(dataset).parts)
    return TrainComponents(
        session=session,
        objective=objective,
        wrapped=wrapped,
        eval_copy=eval_copy,
        optimizer=factory(config.optimizer)(parameter_groups(objective, objective.lr_scales()), lr=config.lr),
        schedule=factory(config.schedule)(
            total_steps=plan.total_steps, steps_per_epoch=len(dataset) // plan.batch_size, lr=config.lr
        ),
        guard=SpikeGuard(num_std=config.spike_guard).to(session.device) if config.spike_guard else None,
        masker=masker,
        image_masker=factory(config.mask)(grid=objective.backbone.grid_of(images)) if mixes_in_images else None,
        augment=make_augment(config, dataset, objective),
        fields=needed_fields(config, dataset),
    )


def make_model(config: TrainConfig, dataset: Dataset, plan: Plan, session: Session) -> tuple[Any, Masker]:
    """On the device."""
    objective, masker = make_objective(config, dataset, plan)
    if "labels" in objective_needs(config):
        check_labels(DatasetTraits.of(dataset).probed or dataset)
    choose_attention(objective, session.device, torch.bfloat16 if session.bf16 else torch.float32)
    return objective.to(session.device).train(), masker


def make_objective(config: TrainConfig, dataset: Dataset, plan: Plan) -> tuple[Any, Masker]:
    """With its first weights, on the CPU. Raises ConfigError where the data set lacks a field that it learns from."""
    needed_fields(config, dataset)
    torch.manual_seed(derive_seed(config.seed, 0, 0, "init"))
    encoder = factory(config.encoder)(clip_shape=(dataset.channels, config.num_frames, *image_size(config)))
    masker = factory(config.mask)(grid=encoder.grid)
    num_mask_tokens = getattr(masker, "num_sets", 1)
    predictor = build_with(
        config.predictor,
        grid=encoder.grid,
        embed_dim=encoder.embed_dim,
        num_heads=config.predictor.get("num_heads") or encoder.num_heads,
        num_mask_tokens=num_mask_tokens,
    )
    objective = build_with(
        config.objective,
        encoder=encoder,
        predictor=predictor,
        regularizers={name: factory(node)() for name, node in config.regularizer.items()},
        num_mask_tokens=num_mask_tokens,
        classes=dataset.classes,
        fields=DatasetTraits.of(dataset).fields,
        batch_size=plan.batch_size,
        total_steps=plan.total_steps,
    )
    if not isinstance(objective, Objective):
        raise ConfigError([f"objective: {type(objective).__name__} must derive from jepa.objectives.base.Objective"])
    return objective, masker


def make_augment(config: TrainConfig, dataset: Dataset, objective: Any) -> Augment | BoxAugment:
    """Smaller crops are cut into the same patches as the others; where boxes are needed they move with the picture."""
    values, size = asdict(config.augment), image_size(config)
    if "boxes" in objective_needs(config):
        crops = ("crop_scale", "crop_aspect", "flip", "jitter", "grayscale", "blur", "solarize")
        return BoxAugment(**picture(config, dataset), **{key: values[key] for key in crops})
    if values["local_views"]:
        grid = objective.backbone.grid
        values["local_size"] = local_size(values["local_size"], size, (size[0] // grid.h, size[1] // grid.w))
    return Augment(**picture(config, dataset), **values)


def needed_fields(config: TrainConfig, dataset: Dataset) -> dict[str, Field]:
    """The fields of the data set that the objective needs besides the labels; ConfigError where it lacks one."""
    names, fields = sorted(objective_needs(config) - {"labels"}), DatasetTraits.of(dataset).fields
    objective = config.objective["_target_"].rpartition(".")[2]
    faults = [
        f"objective: {objective} learns from {name}, and {type(dataset).__name__} has none"
        for name in names
        if name not in fields
    ]
    if faults:
        raise ConfigError(faults)
    return {name: fields[name] for name in names}


def objective_needs(config: TrainConfig) -> Set[str]:
    """The fields that the objective learns from, as its class says in `needs`."""
    return getattr(resolve_name(config.objective["_target_"]), "needs", frozenset())


def make_loggers(config: TrainConfig, folder: RunFolder) -> list[Logger]:
    """The run folder's own log first, then those of the configuration; for rank 0 alone."""
    last = checkpoint.latest(folder.path)
    wired = {
        "folder": folder.path,
        "config": asdict(config),
        "run_id": folder.facts["run_id"],
        "resume_step": checkpoint.peek(last)["step"] if last else None,
    }
    return [FolderLogger(**wired), *(factory(node)(**wired) for node in config.logger.values())]


def start_batches(
    config: TrainConfig, dataset: Dataset, plan: Plan, components: TrainComponents, first_step: int
) -> Generator[RawBatch, None, None]:
    """Endless raw batches of this rank from `first_step` on, downscaled to what the crops need."""
    session = components.session
    return batches(
        dataset,
        batch_size=plan.batch_size // session.world_size,
        seed=config.seed,
        first_step=first_step,
        rank=session.rank,
        world_size=session.world_size,
        num_workers=config.num_workers,
        pin_memory=session.device.type == "cuda",
        canvas=components.augment.canvas,
        fields=components.fields,
    )


def picture(config: TrainConfig, dataset: Dataset) -> dict:
    """What both transforms need to know of the images."""
    return {"image_size": image_size(config), "mean": dataset.mean, "std": dataset.std}


def image_size(config: TrainConfig) -> tuple[int, int]:
    """Height and width in pixels."""
    size = config.image_size
    height, width = size if isinstance(size, Sequence) else (size, size)
    return height, width


MAX_NAMES = 10

log = logging.getLogger(__name__)


def check_labels(dataset: Dataset) -> None:
    """Warns of classes without a sample in one of the parts, as far as the parts' `labels` tell.

    Raises ValueError where a part has no labels or there is no held-out part: to judge on samples whose labels are
    learned would tell nothing.
    """
    held_out = dataset.validation()
    if held_out is None:
        raise ValueError(
            "objective: labels are learned, so they must be judged on samples that are not trained on, and the data "
            "set has no held-out part; name one, as with dataset.val_folder or dataset.val"
        )
    for part, name in ((dataset, "training"), (held_out, "held-out")):
        labels = DatasetTraits.of(part).labels
        if labels is None:
            continue  # drawn on the fly, of all classes
        found = set(np.unique(labels).tolist()) - {-1}
        if not found:
            raise ValueError(f"objective: labels are learned, and none of the {len(part):,} {name} samples has one")
        lacking = [one for number, one in enumerate(dataset.classes) if number not in found]
        if lacking:
            more = f" and {len(lacking) - MAX_NAMES} more" if len(lacking) > MAX_NAMES else ""
            log.warning("no %s sample is of %s%s", name, ", ".join(lacking[:MAX_NAMES]), more)
