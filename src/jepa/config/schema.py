"""Dataclasses of the configurations, and how two configurations are compared."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

import yaml

from jepa.config import signatures
from jepa.config.catalogue import conf_folder, find, flatten
from jepa.types import (
    NonNegative,
    NonNegativeInt,
    Positive,
    PositiveInt,
    PositiveShare,
    Precision,
    Readout,
    ScaleRange,
    Share,
    Within,
)

IRRELEVANT = {
    *("log_every", "eval_every", "save_every", "save_async", "keep", "num_workers", "keep_decoded", "resume", "name"),
    *("device", "strategy", "processes", "threads", "micro_batch_size", "estimate", "verbose", "baselines", "videos"),
    *("ppo_steps", "save_minutes"),
}
IRRELEVANT_SECTIONS = {"logger", "evaluator", "evaluation", "hardware", "chosen"}
"""Keys and sections that may change when a run is resumed, because its result does not depend on them."""


@dataclass(kw_only=True)
class CropConfig:
    """Random crops and flips of the training images."""

    crop_scale: ScaleRange
    crop_aspect: Annotated[list[float], Within(0, above=True)]
    flip: bool


@dataclass(kw_only=True)
class AugmentConfig(CropConfig):
    """Several crops of each image, and changes of their colours."""

    views: PositiveInt
    jitter: Annotated[float, Within(0, 2.5)]
    grayscale: Annotated[Any, Share | Literal["auto"]]
    blur: Share
    solarize: Share
    local_views: NonNegativeInt
    local_scale: ScaleRange
    local_size: Any


@dataclass(kw_only=True)
class EvaluationConfig:
    """Samples of the evaluations during training, and the metric that selects the best checkpoint."""

    train_samples: PositiveInt
    val_samples: PositiveInt
    batch_size: PositiveInt
    still: bool
    judge: str | None


@dataclass(kw_only=True)
class HardwareConfig:
    """The machine that `estimate=true` assumes."""

    gpu: str
    count: PositiveInt
    per_node: PositiveInt
    utilisation: PositiveShare


@dataclass(kw_only=True)
class TrainConfig:
    """The configuration of `jepa-train`; conf/train.yaml explains every key and holds its default."""

    name: str
    epochs: PositiveInt
    steps: PositiveInt | None
    batch_size: PositiveInt
    micro_batch_size: PositiveInt | None
    lr: Positive
    image_size: Any
    num_frames: PositiveInt
    phases: list[Any]
    seed: NonNegativeInt
    resume: Annotated[bool | str, Literal[True, False, "previous"]]
    precision: Precision
    compile: bool
    device: str
    strategy: Annotated[str, Literal["auto", "single", "ddp", "fsdp"]]
    processes: PositiveInt | None
    threads: PositiveInt | str
    num_workers: NonNegativeInt | None
    keep_decoded: Annotated[bool | str, Literal[True, False, "auto"]]
    clip_grad: Positive | None
    spike_guard: Positive | None
    log_every: PositiveInt
    eval_every: PositiveInt | None
    save_every: PositiveInt | None
    save_minutes: Positive | None
    save_async: bool
    keep: PositiveInt
    estimate: bool
    verbose: bool
    augment: AugmentConfig
    evaluation: EvaluationConfig
    hardware: HardwareConfig
    encoder: dict[str, Any]
    mask: dict[str, Any]
    predictor: dict[str, Any]
    objective: dict[str, Any]
    regularizer: dict[str, Any]
    dataset: dict[str, Any]
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    evaluator: dict[str, Any]
    logger: dict[str, Any]
    chosen: dict[str, str] = field(default_factory=dict)
    """keys that were auto -> why they have their values; see jepa.config.auto"""


@dataclass(kw_only=True)
class EvalConfig:
    """The configuration of `jepa-eval`; conf/eval.yaml explains every key and holds its default."""

    run: Any
    task: Any
    name: str
    floors: list[str]
    train_samples: PositiveInt | None
    test_samples: PositiveInt | None
    shots: int | float | None
    seed: NonNegativeInt
    seeds: PositiveInt
    readout: Annotated[str, Readout] | None
    layers: PositiveInt
    solver: Annotated[str, Literal["lbfgs", "sgd"]]
    image_size: Any
    num_frames: PositiveInt
    batch_size: PositiveInt
    cache: bool
    device: str
    precision: Precision
    num_workers: NonNegativeInt | None
    augment: CropConfig
    dataset: dict[str, Any]
    evaluator: dict[str, Any]


@dataclass(kw_only=True)
class ExportConfig:
    """The configuration of `jepa-export`; conf/export.yaml explains every key and holds its default."""

    run: str
    format: str
    output: str | None
    push_to_hub: str | None


@dataclass(kw_only=True)
class CollectConfig:
    """The configuration of `jepa-collect`; conf/collect.yaml explains every key and holds its default."""

    episodes: PositiveInt
    steps: PositiveInt
    seed: NonNegativeInt
    name: str
    source: str | None
    export: str | None
    env: dict[str, Any]
    policy: dict[str, Any]


@dataclass(kw_only=True)
class PlanConfig:
    """The configuration of `jepa-plan`; conf/plan.yaml explains every key and holds its default."""

    run: Any
    experiment: str | None
    train: list[str]
    seeds: PositiveInt
    compare: str | None
    encoders: list[str]
    name: str
    episodes: PositiveInt
    budget: PositiveInt
    seed: NonNegativeInt
    baselines: list[str]
    open_loop: bool
    videos: NonNegativeInt
    planner: dict[str, Any]
    cost: dict[str, Any]
    env: dict[str, Any] | None


@dataclass(kw_only=True)
class RLConfig:
    """The configuration of `jepa-rl`; conf/rl.yaml explains every key and holds its default."""

    name: str
    seed: NonNegativeInt
    env_steps: PositiveInt
    first_steps: PositiveInt | None
    episode_steps: PositiveInt
    rounds: PositiveInt
    explore: Share
    world_steps: PositiveInt
    policy_steps: PositiveInt
    batch_size: PositiveInt
    horizon: PositiveInt
    gamma: Share
    lam: Share
    entropy: NonNegative
    lr: Positive
    clip_grad: Positive
    history: PositiveInt
    sees: Annotated[str, Literal["states", "frames"]]
    log_every: PositiveInt
    save_every: PositiveInt | None
    keep: PositiveInt
    eval_every: PositiveInt
    eval_episodes: PositiveInt
    greedy: bool
    success_return: float | None
    baselines: list[str]
    ppo_steps: list[PositiveInt]
    videos: NonNegativeInt
    device: str
    resume: Annotated[bool | str, Literal[True, False, "previous"]]
    train: list[str]
    world: dict[str, Any]
    env: dict[str, Any]
    policy: dict[str, Any]
    logger: dict[str, Any]


@dataclass(kw_only=True)
class PlayConfig:
    """The configuration of `jepa-play`; conf/play.yaml explains every key and holds its default."""

    run: str
    actions: Any
    typed: bool
    keys: dict[str, Any]
    steps: PositiveInt
    episodes: PositiveInt
    seed: NonNegativeInt
    greedy: bool
    output: str | None
    env: dict[str, Any] | None


@dataclass(kw_only=True)
class FilesConfig:
    """Files that a trained model reads, and how."""

    run: str
    images: str | None
    videos: str | None
    out: str
    batch_size: PositiveInt
    device: str
    precision: Precision
    num_workers: NonNegativeInt | None


@dataclass(kw_only=True)
class EmbedConfig(FilesConfig):
    """The configuration of `jepa-embed`; conf/embed.yaml explains every key and holds its default."""

    readout: Annotated[str, Literal[Readout, "all"]]
    layers: PositiveInt
    part: Annotated[str, Literal["training", "validation"]]
    num_frames: PositiveInt | None
    like: str | None
    neighbours: PositiveInt
    page: str | None
    dataset: dict[str, Any] | None


@dataclass(kw_only=True)
class PredictConfig(FilesConfig):
    """The configuration of `jepa-predict`; conf/predict.yaml explains every key and holds its default."""

    top: PositiveInt
    min_score: Share
    draw: str | None


CONFIGS: dict[str, type[Any]] = {
    "train": TrainConfig, "eval": EvalConfig, "export": ExportConfig, "collect": CollectConfig, "plan": PlanConfig,
    "rl": RLConfig, "play": PlayConfig, "embed": EmbedConfig, "predict": PredictConfig,
}  # fmt: skip
"""Command, and name of its primary configuration in conf/ -> dataclass."""


class _Dumper(yaml.SafeDumper):
    """Quotes text that OmegaConf, other than PyYAML, would read as a number: 1e3."""


_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"), [*"-+0123456789"]
)


def to_yaml(config: TrainConfig | RLConfig) -> str:
    """The text of config.yaml; `jepa-train --config-dir FOLDER --config-name config` runs it again."""
    return yaml.dump(asdict(config), Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=120)


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any], ignore: Collection[str] = ()) -> list[str]:
    """Dotted keys that change the result of a run and differ between two configurations, each with both values.

    Those in `ignore` are left out. A key that only `new` has is left out at its default, which must not change earlier
    results.
    """
    before, after = dict(flatten(old)), dict(flatten(new))
    changed = [key for key in dict.fromkeys([*before, *after]) if before.get(key, "-") != after.get(key, "-")]
    irrelevant = {*IRRELEVANT, *IRRELEVANT_SECTIONS, *ignore}
    changed = [key for key in changed if not irrelevant & {key, key.partition(".")[0]}]
    defaults = (
        dict(flatten(yaml.safe_load((conf_folder() / "train.yaml").read_text(encoding="utf-8")))) if changed else {}
    )
    return [
        f"{key}: {show_value(before.get(key, 'absent'))} -> {show_value(after.get(key, 'absent'))}" for key in changed
        if key in before or not (defaults.get(key, ...) == after[key] or _is_default(key, old, new))
    ]  # fmt: skip


def _is_default(key: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """True if both configurations have a component and `key` in `new` is the default of its constructor."""
    path, _, name = key.rpartition(".")
    nodes = [find(config, path) if path else None for config in (old, new)]
    targets = [node.get("_target_") if isinstance(node, Mapping) else None for node in nodes]
    signature = signatures.read_if_known(targets[1]) if targets[0] == targets[1] else None
    parameter = signature.parameters.get(name) if signature else None
    return parameter is not None and parameter.has_default(find(new, key))


def show_value(value: Any) -> str:
    """A value as written in an override."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"), default=str)
