"""The nouns of detection: data with boxes, what a detector finds, and what its evaluators look at. Without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

from jepa.types import Dataset

if TYPE_CHECKING:
    from torch import Tensor


@runtime_checkable
class BoxDataset(Dataset, Protocol):
    """A data set of pictures of one frame in which things have boxes."""

    def boxes(self, index: int) -> Tensor:
        """float32 [m, 5], of `self[index]`: left, top, right, bottom in pixels, with area and inside; and class"""
        ...

    def test(self) -> BoxDataset | None:
        """The part that is judged once, at the end of a run; None when the data set has none."""
        ...


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
