"""What a detector finds in the held-out pictures: whole ones, in the pixels of their files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from jepa.evaluation.frozen import evaluating
from jepa.evaluation.samples import Samples, Split, progress
from jepa.evaluation.types import BoxSnapshot, Detections, Evaluator
from jepa.parallel.session import Session
from jepa.seeding import generator
from jepa.types import Dataset, DatasetTraits

IMAGES_PER_PICTURE = 16
"""by which `evaluation.batch_size` is divided: the maps of a pyramid take so much memory"""


class Whole(Protocol):
    def __call__(self, pictures: Sequence[Tensor]) -> Tensor:
        """uint8 [C, 1, H, W] of any sizes -> clips [B, C, 1, h, w]"""
        ...

    def restore(self, boxes: Tensor, size: Sequence[int]) -> Tensor:
        """[n, 4] in a clip -> in the picture of height and width"""
        ...


class DetectionSnapshotter:
    """Takes snapshots of a detector on the whole validation part, of more than `val_samples` on as many of them.

    The test part is looked at after `last_step` alone. Pictures that cannot be read are left out and named once.
    """

    def __init__(
        self, *, dataset: Dataset, transform: Whole, session: Session, batch_size: int, val_samples: int,
        seed: int, last_step: int, evaluators: Sequence[Evaluator] = (), num_pictures: int = 4,
    ) -> None:  # fmt: skip
        held_out: Any = dataset.validation()
        test: Any = DatasetTraits.of(dataset).test()
        self.has_evaluators = bool(evaluators)
        if held_out is None and self.has_evaluators:
            raise ValueError("the data set has no held-out part to judge a detector on: name one, or take evaluator=[]")
        self.indices: list[int] = []
        if held_out is not None:
            order = torch.randperm(len(held_out), generator=generator(seed, 0, 0, "validation"))
            self.indices = sorted(order[:val_samples].tolist())
        self.classes = dataset.classes
        self.transform = transform
        self.session = session
        size = max(1, batch_size // IMAGES_PER_PICTURE)
        self.val = _whole_pictures(held_out, "validation", self.indices, size) if self.indices else None
        self.test = _whole_pictures(test, "test", range(len(test)), size) if test else None
        self.last_step = last_step
        self.num_pictures = num_pictures
        beside = f", and {len(test)} test pictures after the last step" if test else ""
        self.protocol = f"detection: {len(self.indices)} whole pictures of the validation part{beside}"

    @property
    def num_samples(self) -> int:
        """How many pictures each evaluation looks at, but for the last."""
        return len(self.indices)

    def snapshot(self, step: int, objective: Any, should_stop: Callable[[], bool] = lambda: False) -> BoxSnapshot:
        """Of a detector on this snapshotter's device; without detections where a weight is not finite.

        `should_stop` is asked between batches; where it says so, Interrupted is raised.
        """
        if not all(bool(weights.isfinite().all()) for weights in objective.parameters()):
            return BoxSnapshot(step, self.classes, val=(), test=(), pictures=(), is_finite=False)
        pictures: list[Tensor] = []
        with evaluating(objective), torch.no_grad(), self.session.autocast():
            val = self._detect(objective, self.val, should_stop, pictures)
            test = self._detect(objective, self.test, should_stop) if step == self.last_step else []
        return BoxSnapshot(step, self.classes, val, test, pictures, is_finite=True)

    def baselines(self, snapshot: BoxSnapshot, evaluators: Sequence[Evaluator]) -> dict[str, float]:
        """None: pixels alone find nothing."""
        return {}

    def _detect(
        self, objective: Any, samples: Samples | None, should_stop: Callable[[], bool],
        first: list[Tensor] | None = None,
    ) -> list[Detections]:  # fmt: skip
        """Of all samples; `first` receives the first pictures."""
        detections: list[Detections] = []
        if samples is None:
            return detections
        with progress(len(samples.split.indices), "detecting", "picture", should_stop) as advance:
            for batch in samples.batches():
                pictures, annotated = batch.values, batch.fields["boxes"]
                clips = self.transform([picture.to(self.session.device) for picture in pictures])
                for picture, boxes, rows in zip(pictures, annotated, objective.detect(clips), strict=True):
                    edges = self.transform.restore(rows[:, :4].float().cpu(), picture.shape[-2:])
                    detections.append(Detections(torch.cat([edges, rows[:, 4:].float().cpu()], dim=1), boxes))
                if first is not None:
                    first += [picture[:, 0] for picture in pictures[: self.num_pictures - len(first)]]
                advance(len(pictures))
        return detections


def _whole_pictures(dataset: Any, name: str, indices: Sequence[int], batch_size: int) -> Samples:
    split = Split(dataset=dataset, name=name, indices=tuple(indices))
    return Samples(split=split, reduce=list, batch_size=batch_size, fields=["boxes"])
