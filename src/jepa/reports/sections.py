"""Sections of a run's report: the charts with their metrics, labels and hints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from jepa.reports.charts import Chart


@dataclass(frozen=True, kw_only=True)
class Curve(Chart):
    """A chart of metrics and baselines, each with its label."""

    metrics: Mapping[str, str]
    baselines: Mapping[str, str] = field(default_factory=dict)
    with_start: bool = False
    """Whether the value at step 0 is drawn as a baseline."""
    factor: float = 1.0
    """Multiplier of the values."""


def probe_curve(name: str, title: str, hint: str) -> Curve:
    """A chart of the metric probe/NAME: trained, at step 0, of middle frames and of raw pixels."""
    return Curve(
        title=title, hint=hint, with_start=True, unit="%",
        metrics={f"probe/{name}": "trained", f"still/{name}": "middle frame only"},
        baselines={f"baseline/pixels_{name}": "raw pixels"},
    )  # fmt: skip


MOTION = "Is motion learned?"
DETECTION = "Are objects found?"
TRAINING = "Training"
SELECTION = "Selection without labels"
AP_OF_CLASS = "detect/ap50_"
MAX_CLASSES = 12
"""Number of classes that one chart can show."""
SECTIONS: dict[str, tuple[str, Sequence[Curve]]] = {
    "Is it learning?": (
        "Probes are fitted on frozen features of the target encoder and scored on images they were not fitted on.",
        (
            Curve(
                title="Classifier", unit="%",
                metrics={
                    "probe/classifier_top1": "top-1", "probe/classifier_top5": "top-5",
                    "probe/classifier_balanced": "balanced",
                },
                hint="The head that is trained, on the held-out part; the last step is the result.",
            ),
            probe_curve(
                "linear_top1", "Linear probe, top-1",
                "Useful features rise clearly above the start and above raw pixels.",
            ),
            probe_curve("knn_top1", "kNN probe, top-1", "Nothing is fitted: the nearest training samples vote."),
            probe_curve(
                "attentive_top1", "Attentive probe, top-1",
                "A learned query pools the tokens, so no detail is lost to averaging.",
            ),
            Curve(
                title="Balanced accuracy", with_start=True, unit="%",
                metrics={
                    "probe/linear_balanced": "linear", "probe/knn_balanced": "kNN",
                    "probe/attentive_balanced": "attentive", "still/linear_balanced": "linear, middle frame",
                },
                baselines={"baseline/pixels_linear_balanced": "raw pixels, linear"},
                hint="Mean recall of the classes, which are uneven: always predicting the largest class gains nothing.",
            ),
            Curve(
                title="Prediction error", log_if_wide=True,
                metrics={
                    "predict/error": "predictor", "predict/trivial_error": "mean target",
                    "predict/copy_error": "copy of the last step",
                    "predict/shuffled_error": "predictor, actions of other samples",
                },
                hint="The predictor must beat the trivial answers; all near zero is a collapse.",
            ),
        ),
    ),
    MOTION: (
        "Motion is learned if the probes of whole clips exceed those of their middle frame, and if the prediction is "
        "better than a copy of the last visible step.",
        (
            Curve(
                title="Gain over trivial predictions",
                metrics={"predict/copy_gain": "over a copy of the last step", "predict/gain": "over the mean target"},
                hint="1 is a perfect prediction, 0 is no better than the trivial one.",
            ),
        ),
    ),
    DETECTION: (
        "Average precision on whole held-out pictures; a detection is correct if its overlap with an annotated box of "
        "its class is a large enough share of their union.",
        (
            Curve(
                title="Mean average precision", unit="%",
                metrics={"detect/map50": "overlap 0.5", "detect/map75": "overlap 0.75", "detect/map": "0.5 to 0.95"},
                hint="Detections of objects that are not annotated count as wrong.",
            ),
            Curve(
                title="Terms of the loss", log_if_wide=True,
                metrics={
                    "train/classifier": "class of a region", "train/box_reg": "box of a region",
                    "train/objectness": "objectness", "train/rpn_box_reg": "box of a proposal",
                    "train/classification": "class", "train/bbox_regression": "box", "train/bbox_ctrness": "centre",
                },
            ),
        ),
    ),
    "Is it collapsing?": (
        "A collapsed encoder gives every image nearly the same vector, and its loss is the lowest.",
        (
            Curve(
                title="Effective rank", metrics={"collapse/rank_centred": "centred", "collapse/rank": "raw"},
                baselines={"baseline/pixels_rank": "raw pixels, raw"},
                hint="Number of directions in use. A centred rank near 1 is a collapse; a falling one may become one.",
            ),
            Curve(
                title="Spread of the features", log_if_wide=True,
                metrics={"collapse/std": "mean std", "collapse/std_min": "smallest std"},
                hint="Standard deviation of a dimension over images. Near zero it is a collapse.",
            ),
            Curve(
                title="Mean cosine between images", metrics={"collapse/cosine": "cosine"},
                hint="1 means that all images point the same way.",
            ),
        ),
    ),
    SELECTION: (
        "To choose between checkpoints or runs without labels. Compare runs of the same method, and look at the "
        "effective rank and the gain over trivial predictions too.",
        (
            Curve(
                title="LiDAR", metrics={"select/lidar": "LiDAR"},
                hint="Directions in which images differ beyond crops of one. Should rise, but fell in some good runs.",
            ),
            Curve(
                title="Exponent of the eigenvalues", metrics={"select/alpha": "alpha"},
                hint="alpha-ReQ. Near 1 is best; far above, few directions matter, far below, noise dominates.",
            ),
        ),
    ),
    TRAINING: (
        "The loss is no measure of progress: a fall and a rise are healthy, a sudden drop can be a partial collapse.",
        (
            Curve(title="Loss", metrics={"train/loss": "loss"}, log_if_wide=True),
            Curve(title="Gradient norm", metrics={"train/grad_norm": "before clipping"}, log_if_wide=True),
            Curve(title="Learning rate", metrics={"train/lr": "lr"}),
            Curve(title="Weight decay", metrics={"train/weight_decay": "weight decay"}),
            Curve(title="Momentum of the target encoder", metrics={"train/momentum": "momentum"}),
        ),
    ),
    "Speed": (
        "",
        (
            Curve(title="Throughput", metrics={"perf/samples_per_s": "samples"}, unit="samples/s"),
            Curve(
                title="Waiting for data", metrics={"perf/data_wait": "of the time"}, unit="%", factor=100,
                hint="Above a few percent, the loader limits the speed: raise num_workers.",
            ),
            Curve(title="Peak memory", metrics={"perf/peak_memory_gib": "so far"}, unit="GiB"),
        ),
    ),
}  # fmt: skip


def class_curves(names: Iterable[str]) -> list[Curve]:
    """A chart of the average precision of each class; none for a single class or more than MAX_CLASSES."""
    labels = {name: name.removeprefix(AP_OF_CLASS) for name in names if name.startswith(AP_OF_CLASS)}
    curve = Curve(title="Average precision by class, overlap 0.5", unit="%", metrics=labels)
    return [curve] if 1 < len(labels) <= MAX_CLASSES else []
