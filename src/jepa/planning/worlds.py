"""The worlds that an experiment trains for jepa-plan, all checked before the first one starts. Without torch.

With compare=encoders they differ in their encoders alone: `jepa` learns its encoder with the dynamics; the others keep
theirs as it is, and only the projector of the states and the dynamics learn, by the same loss with the same
regularizer. The encoders of `mae`, `vae` and `autoencoder` are trained before on single frames of the same episodes:
as many steps, and as many frames in each, as the world.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jepa.config import Composer, ConfigError, PlanConfig, TrainConfig, build_with, override_literal, to_dataclass
from jepa.config.command_rules import as_list, planner_error, runs_discrete
from jepa.config.heads import stored_config
from jepa.data.episode_store import StoreFacts
from jepa.errors import FileError

PRETRAINED = {
    "mae": ("objective=mae", "mask=random"),
    "vae": ("objective=vae",),
    "autoencoder": ("objective=autoencoder",),
}
"""Encoders that are trained before their world, with the overrides of that training."""
OF_WORLD = {"objective", "mask", "predictor", "regularizer", "num_frames", "batch_size", "phases"}
"""Sections of a world that the training of an encoder before it has otherwise."""
OF_ENCODER = {"encoder", "size"}
FROZEN = "objective.freeze=true"


@dataclass(frozen=True)
class WorldRun:
    """A world to be trained in outputs/NAME."""

    name: str
    encoder: str
    """As in `encoders`; empty without a comparison."""
    overrides: Sequence[str]
    pretraining: TrainConfig | None = None
    """The training of the encoder before it."""

    def stages(self, composer: Composer) -> Iterator[TrainConfig]:
        """What is trained, one after the other; the world is composed when its encoder is there."""
        if self.pretraining:
            yield self.pretraining
        yield self.config(composer)

    def config(self, composer: Composer) -> TrainConfig:
        """Of the world. Raises ConfigError."""
        config = to_dataclass(composer.compose(self.overrides))
        config.name = self.name
        return config


def experiment_runs(config: PlanConfig, composer: Composer) -> list[WorldRun]:
    """For every seed one world, or one for each encoder. Raises ConfigError with the errors of all of them."""
    runs: list[WorldRun] = []
    errors: list[str] = []
    encoders = dict.fromkeys(config.encoders) if config.compare else ("",)
    for seed in range(config.seeds):
        shared = [f"experiment={config.experiment}", f"seed={seed}", *config.train]
        base = to_dataclass(composer.compose(shared))
        if config.compare and base.steps is None:
            raise ConfigError([f"compare=encoders: {config.experiment} says no steps; give train=['steps=1000']"])
        for encoder in encoders:
            try:
                runs.append(_run(encoder, base, shared, composer))
            except ConfigError as error:
                errors += [f"encoders={encoder}: {text}" for text in error.errors]
    is_discrete = acts_discretely(config.experiment, config.train, composer)
    errors += planner_error(config.planner["_target_"], str(config.experiment), is_discrete)
    if errors:
        raise ConfigError(errors)
    return runs


def _run(encoder: str, base: TrainConfig, shared: Sequence[str], composer: Composer) -> WorldRun:
    end = f"-seed{base.seed}" if base.seed else ""
    if encoder in ("", "jepa"):
        return WorldRun(base.name + end, encoder, shared)
    slug, pretraining = re.sub(r"[^\w.-]+", "_", encoder).strip("_"), None
    name = f"{base.name}-{slug}"
    if encoder == "untrained":
        return WorldRun(name + end, encoder, [*shared, FROZEN])
    others = [*without(shared, OF_ENCODER), FROZEN]
    if encoder == "pixels":
        patch = [text for text in shared if text.startswith("encoder.patch_size=")]
        return WorldRun(name + end, encoder, [*others, "encoder=pixels", *patch])
    if encoder in PRETRAINED:
        frames = f"batch_size={base.batch_size * base.num_frames}"
        overrides = [*without(shared, OF_WORLD), *PRETRAINED[encoder], "num_frames=1", frames]
        pretraining = to_dataclass(composer.compose(overrides))
        pretraining.name = f"{name}-encoder{end}"
    weights = os.path.join("outputs", pretraining.name) if pretraining else encoder
    chosen = ["encoder=pretrained", f"encoder.weights={override_literal(weights)}"]
    run = WorldRun(name + end, encoder, [*others, *chosen], pretraining)
    if pretraining is None:
        run.config(composer)
    return run


def without(overrides: Sequence[str], sections: Collection[str]) -> Iterator[str]:
    """Those overrides that set nothing in these sections."""
    return (text for text in overrides if re.split(r"[.=]", text.lstrip("+~"), maxsplit=1)[0] not in sections)


def with_planner(overrides: Sequence[str], config_dir: str | None) -> tuple[list[str], str]:
    """The overrides, with the planner that the worlds ask for if none is named, and the reason why."""
    if any(text.startswith("planner=") for text in overrides):
        return list(overrides), ""
    config: Mapping[str, Any] = Composer(config_dir, "plan").check(overrides).config
    run, experiment, train = config.get("run"), config.get("experiment"), config.get("train") or ()
    is_discrete = runs_discrete(run)
    if is_discrete is None and experiment:
        is_discrete = acts_discretely(experiment, train, Composer(config_dir))
    if is_discrete:
        return [*overrides, "planner=categorical_cem"], "since the actions are discrete"
    heads = heads_of(run, experiment, train, Composer(config_dir))
    if "metric" in heads and "value" not in heads:
        return [*overrides, "planner=tree"], "since the worlds have a metric and no value"
    return list(overrides), ""


def heads_of(run: Any, experiment: str | None, train: Sequence[str], composer: Composer) -> Collection[str]:
    """The heads that the first run or the experiment names; errors are left to those who need them."""
    config: Mapping[str, Any] = {}
    if run is not None:
        with suppress(ValueError, FileError):
            config = stored_config(str(as_list(run)[0]))
    elif experiment:
        config = composer.check([f"experiment={experiment}", *train]).config
    return (config.get("objective") or {}).get("heads") or ()


def acts_discretely(experiment: str | None, train: Sequence[str], composer: Composer) -> bool | None:
    """True if the actions of an experiment's episodes are discrete; None if neither they nor an environment are there.

    Errors of the configuration and of the environment are left to those who need them.
    """
    dataset = composer.check([f"experiment={experiment}", *train]).config.get("dataset") or {}
    path = Path(str(dataset.get("path"))).expanduser()
    if (path / "store.json").exists():
        return StoreFacts.read(path).actions.is_discrete
    return build_with(dataset["env"]).actions.is_discrete if dataset.get("env") else None
