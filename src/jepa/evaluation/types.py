"""What evaluators receive and return. Nothing here imports torch at run time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

from jepa.types import Masks, PatchGrid, Traits

if TYPE_CHECKING:
    import torch
    from torch import Generator, Tensor, nn


class Detections(NamedTuple):
    """What a detector finds in a picture and what is annotated there, in pixels of the file, on the CPU."""

    found: Tensor
    """float32 [n, 6]: left, top, right, bottom, class, score"""
    annotated: Tensor
    """float32 [m, 5]: left, top, right, bottom, class"""


@dataclass(frozen=True)
class BoxSnapshot:
    """What the evaluators of a detector look at: its findings at one moment of the training."""

    step: int
    classes: tuple[str, ...]
    val: Sequence[Detections]
    test: Sequence[Detections]
    """empty until the last step, and where there is no such part"""
    pictures: Sequence[Tensor]
    """uint8 [C, h, w]: the first validation samples, as they are in their files"""
    is_finite: bool
    """whether all weights are"""


class Features(NamedTuple):
    vectors: Tensor
    """float32 [n, D] on the CPU"""
    labels: Tensor
    """long [n]"""
    targets: Tensor | None = None
    """float32 [n, Q], the field quantities of the data set; nan where one is unknown"""
    tokens: Tensor | None = None
    """float16 [n, J, D], averaged over neighbours down to what an evaluator asks for; None where none asks"""


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What it takes to train the encoder of the moment further, on the training samples of the probe."""

    backbone: nn.Module
    """to be copied, never to be changed"""
    device: torch.device
    seed: int
    num_train: int
    """samples of one pass, unreadable ones included"""
    train: Callable[[int, Generator], Iterable[tuple[Tensor, Tensor]]]
    """(batch_size, generator) -> random crops [b, C, T, H, W] and labels [b] on the device, one pass in random order"""
    val: Callable[[], Iterable[Tensor]]
    """clips [b, C, T, H, W] on the device, in the order of `Snapshot.val`, as the encoder is probed on them"""
    autocast: Callable[[], AbstractContextManager]
    should_stop: Callable[[], bool]


@dataclass(frozen=True)
class Snapshot:
    """What the evaluators look at: frozen features of one moment of the training, all on the CPU."""

    step: int
    train: Features
    val: Features
    classes: tuple[str, ...]
    grid: PatchGrid
    pictures: Tensor
    """uint8 [P, C, T, H, W]: the first P validation samples, as the encoder saw them before normalisation"""
    tokens: Tensor
    """float32 [P, N, D] of those pictures"""
    thumbnails: Tensor
    """uint8 [n, C, 32, 32] of the validation samples, of clips the middle frame"""
    masks: Masks
    """of a few hundred samples, as in training"""
    diagnosis: Mapping[str, float]
    """what `Objective.diagnose` said on validation samples"""
    quantities: tuple[str, ...] = ()
    """names of the columns of `targets`"""
    reconstructions: Mapping[str, Tensor] = field(default_factory=dict)
    """uint8 [b, C, T, H, W] by name: what `Objective.pictures` gave for `pictures`"""
    still: tuple[Features, Features] | None = None
    """train and val of clips that show their middle frame all the time, where motion is told apart"""
    views: Tensor | None = None
    """float32 [n, q, D]: random crops of the first validation samples, where an evaluator asks for them"""
    tuning: Tuning | None = None
    """not on the CPU but where the run is"""
    logits: Tensor | None = None
    """float32 [n, classes] for the validation samples, where the objective has a head that classifies"""

    @property
    def is_finite(self) -> bool:
        return bool(self.val.vectors.isfinite().all())


@dataclass(frozen=True)
class Picture:
    """uint8 [H, W, 3] for a logger to show."""

    name: str
    pixels: Tensor
    caption: str = ""


@dataclass(frozen=True)
class EmbeddingTable:
    """Vectors [n, D] with labels and thumbnails uint8 [n, C, h, w], for a projector."""

    name: str
    vectors: Tensor
    labels: Sequence[str]
    thumbnails: Tensor


@dataclass(frozen=True)
class Evaluation:
    """Metrics have names with a slash ("probe/knn_top1") and float values."""

    metrics: dict[str, float] = field(default_factory=dict)
    pictures: tuple[Picture, ...] = ()
    tables: tuple[EmbeddingTable, ...] = ()


Evaluator = Callable[[Snapshot], Evaluation]


@dataclass(frozen=True)
class EvaluatorTraits(Traits):
    """Optional attributes of an evaluator."""

    protocol: str = ""
    """how it evaluates, in a sentence for the log"""
    needs_tokens: int = 0
    """largest number of tokens of a sample that it reads"""
    num_views: int = 0
    """random crops that it reads, of each of the first `num_viewed` validation samples; `view_scale` is their area"""
    only_at_ends: bool = False
    """whether it runs before the first and after the last step alone"""


class Logger(Protocol):
    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def show(self, step: int, evaluation: Evaluation) -> None:
        """Pictures and tables of an evaluation; its metrics come through `log`."""
        ...

    def close(self, status: str) -> None:
        """`status` is finished, stopped or failed."""
        ...
