"""Inputs and results of evaluators. Nothing here imports torch at run time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

from jepa.types import Masks, PatchGrid, Traits

if TYPE_CHECKING:
    from torch import Tensor

    from jepa.evaluation.frozen import Tuning


class Detections(NamedTuple):
    """Boxes of one picture, in pixels of the file, on the CPU."""

    predictions: Tensor
    """float32 [n, 6]: left, top, right, bottom, class, score"""
    ground_truth: Tensor
    """float32 [m, 5]: left, top, right, bottom, class"""


@dataclass(frozen=True)
class BoxSnapshot:
    """Input of the evaluators of a detector: its detections at one step of the training."""

    step: int
    classes: tuple[str, ...]
    val: Sequence[Detections]
    test: Sequence[Detections]
    """Empty before the last step, and without a test part."""
    pictures: Sequence[Tensor]
    """uint8 [C, h, w]: the first validation samples, as in their files"""
    is_finite: bool
    """False if a weight of the detector is not finite."""

    @property
    def num_evaluated(self) -> int:
        return len(self.val)


class Features(NamedTuple):
    vectors: Tensor
    """float32 [n, D] on the CPU"""
    labels: Tensor
    """long [n]"""
    targets: Tensor | None = None
    """float32 [n, Q]: the field `quantities` of the data set; nan if unknown"""
    tokens: Tensor | None = None
    """float16 [n, J, D], neighbours averaged; None unless an evaluator needs tokens"""
    readouts: Mapping[str, Tensor] = {}
    """float32 [n, d] on the CPU: what `vectors` are by other readouts than the mean, by name"""

    def by(self, readout: str) -> Features:
        """Features whose vectors are those of the readout; of features of pixels, which have none, the same."""
        return self._replace(vectors=self.readouts.get(readout, self.vectors), readouts={})


@dataclass(frozen=True)
class Snapshot:
    """Input of the evaluators: frozen features at one step of the training, on the CPU except `tuning`."""

    step: int
    train: Features
    val: Features
    classes: tuple[str, ...]
    grid: PatchGrid
    pictures: Tensor
    """uint8 [P, C, T, H, W]: the first P validation samples before normalisation"""
    tokens: Tensor
    """float32 [P, N, D] of `pictures`"""
    thumbnails: Tensor
    """uint8 [n, C, 32, 32] of the validation samples; of a clip the middle frame"""
    masks: Masks
    """Masks of a few hundred samples, drawn as in training."""
    diagnosis: Mapping[str, float]
    """Result of `Objective.diagnose` on validation samples."""
    quantities: tuple[str, ...] = ()
    """Names of the columns of `targets`."""
    reconstructions: Mapping[str, Tensor] = field(default_factory=dict)
    """uint8 [b, C, T, H, W] by name: result of `Objective.pictures` for `pictures`"""
    still: tuple[Features, Features] | None = None
    """Training and validation features of clips that repeat their middle frame; the baseline without motion."""
    views: Tensor | None = None
    """float32 [n, q, D]: random crops of the first validation samples, if an evaluator needs them"""
    tuning: Tuning | None = None
    logits: Tensor | None = None
    """float32 [n, classes] of the validation samples, if the objective has a classification head"""

    @property
    def is_finite(self) -> bool:
        return bool(self.val.vectors.isfinite().all())

    @property
    def num_evaluated(self) -> int:
        return len(self.val.labels)


@dataclass(frozen=True)
class Picture:
    """A picture uint8 [H, W, 3] for the loggers."""

    name: str
    pixels: Tensor
    caption: str = ""


@dataclass(frozen=True)
class EmbeddingTable:
    """Vectors [n, D] with labels and thumbnails uint8 [n, C, h, w], for an embedding projector."""

    name: str
    vectors: Tensor
    labels: Sequence[str]
    thumbnails: Tensor


@dataclass(frozen=True)
class Evaluation:
    """Names of metrics have a slash, e.g. "probe/knn_top1"."""

    metrics: dict[str, float] = field(default_factory=dict)
    pictures: tuple[Picture, ...] = ()
    tables: tuple[EmbeddingTable, ...] = ()


Evaluator = Callable[[Snapshot], Evaluation]


@dataclass(frozen=True)
class EvaluatorTraits(Traits):
    """Optional attributes of an evaluator."""

    protocol: str = ""
    """The method in a sentence for the log."""
    readout: str = "mean"
    """What it reads of the tokens: a name of `evaluation.readout.READOUTS`."""
    needs_tokens: int = 0
    """Largest number of tokens per sample that it needs."""
    num_views: int = 0
    """Random crops, `view_scale` of the area, that it needs of each of the first `num_viewed` validation samples."""
    only_at_ends: bool = False
    """True if it runs only before the first and after the last step."""


class Logger(Protocol):
    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def show(self, step: int, evaluation: Evaluation) -> None:
        """Logs pictures and tables of an evaluation; its metrics go to `log`."""
        ...

    def close(self, status: str) -> None:
        """`status` is finished, stopped or failed."""
        ...
