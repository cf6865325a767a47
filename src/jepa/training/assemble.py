"""Builds a run from a checked configuration, in reading order: sizes flow one way, through constructors."""

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
from jepa.config.auto import chosen_lines
from jepa.data.box_transforms import BoxAugment, Letterbox
from jepa.data.identity import changes, has_grown, identity
from jepa.data.images import ImageFolder
from jepa.data.loader import BrokenSamples, batches
from jepa.data.mixture import MixtureCounter
from jepa.data.survey import advice, survey
from jepa.data.transforms import Augment, EvalTransform
from jepa.encoders.names import TABLE
from jepa.evaluation.box_snapshot import DetectionSnapshotter
from jepa.evaluation.snapshot import Snapshotter
from jepa.evaluation.stems import fit_stems
from jepa.evaluation.types import Evaluator, Logger
from jepa.layers.attention import choose_attention
from jepa.layers.dictionary import DictionaryStem
from jepa.masks.geometry import local_size
from jepa.objectives.base import Objective
from jepa.optim import parameter_groups
from jepa.parallel.device import device_name
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
    """Part of a run with its own sizes, which are those in `config`; `whole` is the configuration of the run."""

    config: TrainConfig
    whole: TrainConfig
    begin_step: int
    end_step: int
    total_steps: int


def split_phases(config: TrainConfig, dataset_size: int) -> list[Phase]:
    """The phases of the run in steps, one if the configuration has none.

    Raises ConfigError if the data set is smaller than a batch, or a phase has no step.
    """
    per_epoch = dataset_size // config.batch_size
    if per_epoch == 0:
        error = f"batch_size={config.batch_size}: the data set has only {dataset_size} samples; lower batch_size"
        raise ConfigError([error])
    total = config.steps if config.steps is not None else config.epochs * per_epoch
    phases, done = [], 0.0
    for number, phase in enumerate(config.phases or [{"share": 1.0}]):
        sizes = {key: value for key, value in phase.items() if key != "share"}
        begin, done = round(done * total), done + phase["share"]
        end = total if number + 1 == len(config.phases) else round(done * total)
        if end <= begin:
            raise ConfigError([f"phases[{number}].share={phase['share']}: has no step in a run of {total}"])
        phases.append(Phase(replace(config, **sizes), config, begin, end, total))
    return phases


def phases_left(config: TrainConfig, dataset_size: int, folder: Path) -> list[Phase]:
    """Phases that are not finished according to the last checkpoint; if all are, the last phase."""
    phases, last = split_phases(config, dataset_size), checkpoint.latest(folder)
    done = checkpoint.peek(last)["step"] if last else 0
    if done > phases[-1].end_step:
        error = f"{folder} has trained {done} steps already, and the run is to end after {phases[-1].end_step}"
        raise ConfigError([f"{error}: give more steps= or epochs=, or another name="])
    return [phase for phase in phases if phase.end_step > done] or phases[-1:]


def data_identity(dataset: Dataset, folder: Path) -> dict[str, Any]:
    """What the data set consists of. Raises ConfigError if the run in the folder has other data so far."""
    data, last = identity(dataset), checkpoint.latest(folder)
    before = checkpoint.peek(last).get("data") if last else None
    if before and has_grown(before, dataset):
        log.info(
            "%s: the data set has grown from %s to %s samples", folder, f"{before['num_samples']:,}",
            f"{len(dataset):,}",
        )  # fmt: skip
    elif before and (differences := changes(before, data)):
        reason = f"the data set has changed since the run was begun: {'; '.join(differences)}"
        advice = (
            "put the data back, or give another name= (encoder=pretrained encoder.weights=FOLDER keeps the weights)"
        )
        raise ConfigError([f"{folder}: {reason}; {advice}"])
    return data


def assemble(phase: Phase, dataset: Dataset, folder: Path, session: Session) -> Run:
    """Raises ConfigError or ValueError for errors that show only when the components are built."""
    config = phase.config
    plan = make_plan(phase, len(dataset), session.world_size)
    components = make_components(config, dataset, plan, session, is_new=checkpoint.latest(folder) is None)
    encoder: Any = components.objective.backbone
    check_phases(phase.whole, encoder)
    encoder_node = getattr(encoder, "node", config.encoder | {"clip_shape": encoder.clip_shape})
    evaluators = [factory(node)() for node in config.evaluator.values()]
    return Run(
        folder=folder,
        plan=plan,
        components=components,
        snapshotter=make_snapshotter(phase, dataset, components, evaluators),
        evaluators=evaluators,
        batches=partial(start_batches, config, dataset, plan, components),
        broken=BrokenSamples(dataset),
        shares=MixtureCounter(dataset),
        config_text=to_yaml(phase.whole),
        facts={
            "clip_shape": encoder.clip_shape,
            "mean": dataset.mean,
            "std": dataset.std,
            "encoder": encoder_node,
            **world_facts(components.objective, dataset),
        },
        writer=checkpoint.Writer(folder, session, keep=config.keep, asynchronous=config.save_async),
        judge=config.evaluation.judge,
    )


def world_facts(objective: Any, dataset: Dataset) -> dict[str, Any]:
    """What a world model must later be used with: its own contract, and that of the episodes it learnt from."""
    channels, _, height, width = objective.backbone.clip_shape
    default = {"frame_shape": (channels, height, width), "frame_skip": 1, "env": {}}
    contract = objective.contract
    return {"world": {**default, **DatasetTraits.of(dataset).world, **contract}} if contract else {}


def make_snapshotter(
    phase: Phase, dataset: Any, components: TrainComponents, evaluators: Sequence[Evaluator]
) -> Snapshotter | DetectionSnapshotter:
    """Takes snapshots of the detections of a detector, of the backbone's features for other objectives."""
    config = phase.config
    arguments: dict[str, Any] = {
        "session": components.session, "seed": config.seed, "evaluators": evaluators,
        "batch_size": config.evaluation.batch_size, "val_samples": config.evaluation.val_samples,
    }  # fmt: skip
    images = transform_arguments(config, dataset)
    if "boxes" in components.fields:
        return DetectionSnapshotter(
            dataset=dataset, transform=Letterbox(**images), last_step=phase.total_steps, **arguments
        )
    crops = {key: getattr(config.augment, key) for key in ("crop_scale", "crop_aspect", "flip")}
    return Snapshotter(
        dataset=DatasetTraits.of(dataset).probe_dataset or dataset, transform=EvalTransform(**images),
        masker=components.masker, crops=partial(Augment, **images, **crops),
        train_samples=config.evaluation.train_samples, still=config.evaluation.still, fields=components.fields,
        **arguments,
    )  # fmt: skip


def check_phases(config: TrainConfig, encoder: Any) -> None:
    """Raises ConfigError if phases of several sizes would share one table of positions among the weights."""
    sizes = {f"{phase.get('image_size')} {phase.get('num_frames')}" for phase in config.phases}
    if len(sizes) > 1 and TABLE in encoder.state_dict():
        raise ConfigError(["phases: these weights keep positions of one size (position=table); run one size at a time"])


def log_survey(config: TrainConfig, dataset: Dataset) -> None:
    """Say which settings were chosen, what a folder of images holds, and which settings it speaks against."""
    for line in chosen_lines(asdict(config)):
        log.info("%s", line)
    if isinstance(dataset, ImageFolder) and (found := survey(dataset, dataset.labels)):
        log.info("%s", found)
        size, jitter = image_size(config), config.augment.jitter
        if jitter and dataset.channels != 3:
            log.info("augment.jitter changes brightness and contrast alone: saturation and hue need three channels")
        for sentence in advice(found, image_size=size, channels=dataset.channels, jitter=jitter):
            log.info("%s", sentence)


def make_dataset(config: TrainConfig) -> Dataset:
    return build_with(config.dataset, num_frames=config.num_frames)


def make_plan(phase: Phase, dataset_size: int, world_size: int = 1) -> Plan:
    """Raises ConfigError if the batch cannot be divided equally among the ranks."""
    config, total = phase.config, phase.total_steps
    rank_batch_size, remainder = divmod(config.batch_size, world_size)
    if remainder:
        near = near_multiples(config.batch_size, world_size)
        raise ConfigError([f"batch_size={config.batch_size}: {world_size} processes share a batch equally; use {near}"])
    return Plan(
        total_steps=total, begin_step=phase.begin_step, end_step=phase.end_step, batch_size=config.batch_size,
        micro_batch_size=min(config.micro_batch_size or rank_batch_size, rank_batch_size), dataset_size=dataset_size,
        seed=config.seed, log_every=config.log_every, eval_every=config.eval_every or math.ceil(total / 5),
        save_every=config.save_every or max(1, min(1000, total // 10)),
        save_seconds=math.inf if config.save_minutes is None else 60 * config.save_minutes, clip_grad=config.clip_grad,
    )  # fmt: skip


def make_components(
    config: TrainConfig, dataset: Dataset, plan: Plan, session: Session, *, is_new: bool = True
) -> TrainComponents:
    """The components of a training step, on the device of the session. Raises ConfigError or ValueError.

    Only in a run that `is_new` a dictionary has to be fitted; in others a checkpoint is loaded afterwards.
    """
    objective, masker = make_objective(config, dataset, plan)
    if is_new:
        fit_stems(objective, dataset, EvalTransform(**transform_arguments(config, dataset)), seed=config.seed)
    if "labels" in objective_needs(config):
        check_labels(DatasetTraits.of(dataset).probe_dataset or dataset)
    choose_attention(objective, session.device, torch.bfloat16 if session.bf16 else torch.float32)
    objective = objective.to(session.device).train()
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
        stems=[part for part in objective.modules() if isinstance(part, DictionaryStem) and part.filters.requires_grad],
        fields=needed_fields(config, dataset),
    )


def make_objective(config: TrainConfig, dataset: Dataset, plan: Plan) -> tuple[Any, Masker]:
    """Objective with initial weights, and masker, on the CPU. Raises ConfigError if the data set lacks a field."""
    needed_fields(config, dataset)
    torch.manual_seed(derive_seed(config.seed, 0, 0, "init"))
    encoder = factory(config.encoder)(clip_shape=(dataset.channels, config.num_frames, *image_size(config)))
    masker = factory(config.mask)(grid=encoder.grid)
    num_mask_tokens = getattr(masker, "num_sets", 1)
    predictor = build_with(
        config.predictor, grid=encoder.grid, embed_dim=encoder.embed_dim,
        num_heads=config.predictor.get("num_heads") or encoder.num_heads, num_mask_tokens=num_mask_tokens,
        fields=DatasetTraits.of(dataset).fields,
    )  # fmt: skip
    objective = build_with(
        config.objective, encoder=encoder, predictor=predictor,
        regularizers={name: factory(node)() for name, node in config.regularizer.items()},
        num_mask_tokens=num_mask_tokens, classes=dataset.classes, fields=DatasetTraits.of(dataset).fields,
        batch_size=plan.batch_size, total_steps=plan.total_steps,
    )  # fmt: skip
    if not isinstance(objective, Objective):
        raise ConfigError([f"objective: {type(objective).__name__} must derive from jepa.objectives.base.Objective"])
    return objective, masker


def make_augment(config: TrainConfig, dataset: Dataset, objective: Any) -> Augment | BoxAugment:
    """The augmentation on the device; of images with boxes it transforms both."""
    values, size, images = asdict(config.augment), image_size(config), transform_arguments(config, dataset)
    if "boxes" in objective_needs(config):
        keys = ("crop_scale", "crop_aspect", "flip", "jitter", "grayscale", "blur", "solarize")
        return BoxAugment(**images, **{key: values[key] for key in keys})
    if values["local_views"]:
        grid = objective.backbone.grid
        values["local_size"] = local_size(values["local_size"], size, (size[0] // grid.h, size[1] // grid.w))
    return Augment(**images, **values)


def needed_fields(config: TrainConfig, dataset: Dataset) -> dict[str, Field]:
    """The fields besides the labels that the objective learns from; ConfigError if the data set lacks one."""
    names, fields = sorted(objective_needs(config) - {"labels"}), DatasetTraits.of(dataset).fields
    objective, data = config.objective["_target_"].rpartition(".")[2], type(dataset).__name__
    if missing := [name for name in names if name not in fields]:
        reasons = [f"{objective} learns from {name}, and {data} has none" for name in missing]
        raise ConfigError([f"objective: {reason}; it has {', '.join(fields) or 'no fields'}" for reason in reasons])
    uses = getattr(resolve_name(config.objective["_target_"]), "uses", frozenset())
    return {name: fields[name] for name in [*names, *sorted(uses & fields.keys())]}


def objective_needs(config: TrainConfig) -> Set[str]:
    """The names of all fields that the objective cannot learn without."""
    return getattr(resolve_name(config.objective["_target_"]), "needs", frozenset())


def make_loggers(config: TrainConfig, folder: RunFolder, session: Session) -> list[Logger]:
    """The logger of the run folder, then those of the configuration; for rank 0 only."""
    last = checkpoint.latest(folder.path)
    arguments = {
        "folder": folder.path, "config": asdict(config), "run_id": folder.facts["run_id"],
        "resume_step": checkpoint.peek(last)["step"] if last else None,
    }  # fmt: skip
    device = f"{session.world_size} x " * (not session.is_single) + device_name(session.device)
    return [FolderLogger(**arguments, device=device), *(factory(node)(**arguments) for node in config.logger.values())]


def start_batches(
    config: TrainConfig, dataset: Dataset, plan: Plan, components: TrainComponents, first_step: int
) -> Generator[RawBatch, None, None]:
    """Endless raw batches of this rank from `first_step` on, downscaled to the size that the crops need."""
    session = components.session
    return batches(
        dataset, batch_size=plan.batch_size // session.world_size, seed=config.seed, first_step=first_step,
        rank=session.rank, world_size=session.world_size, num_workers=config.num_workers,
        pin_memory=session.device.type == "cuda", short_side=components.augment.short_side, fields=components.fields,
        keep_decoded=config.keep_decoded,
    )  # fmt: skip


def transform_arguments(config: TrainConfig, dataset: Dataset) -> dict:
    """Size and statistics of the images, for all transforms."""
    return {"image_size": image_size(config), "mean": dataset.mean, "std": dataset.std}


def image_size(config: TrainConfig) -> tuple[int, int]:
    """Height and width in pixels."""
    size = config.image_size
    return (size[0], size[1]) if isinstance(size, Sequence) else (size, size)


log = logging.getLogger(__name__)
MAX_NAMES = 10
"""Number of class names in a warning."""


def check_labels(dataset: Dataset) -> None:
    """Warn of classes without a training or held-out sample, as far as the data set's `labels` are known.

    Raises ValueError if none of these samples has a label, or there are no held-out samples to evaluate on.
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
            continue  # samples are generated, of all classes
        present = set(np.unique(labels).tolist()) - {-1}
        if not present:
            raise ValueError(f"objective: labels are learned, and none of the {len(part):,} {name} samples has one")
        missing = [class_name for number, class_name in enumerate(dataset.classes) if number not in present]
        if missing:
            more = f" and {len(missing) - MAX_NAMES} more" if len(missing) > MAX_NAMES else ""
            log.warning("no %s sample is of %s%s", name, ", ".join(missing[:MAX_NAMES]), more)
