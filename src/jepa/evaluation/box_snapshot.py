"""Snapshots of a detector: its predictions for whole held-out pictures, in the pixels of the files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from jepa.evaluation.frozen import eval_mode
from jepa.evaluation.samples import Samples, Split, progress
from jepa.evaluation.types import BoxSnapshot, Detections, Evaluator
from jepa.parallel.session import Session
from jepa.seeding import generator
from jepa.types import Dataset, DatasetTraits

if TYPE_CHECKING:
    from jepa.data.box_transforms import Letterbox

IMAGES_PER_PICTURE = 16
"""Divisor of `evaluation.batch_size`: feature pyramids of whole pictures take that much more memory."""


class DetectionSnapshotter:
    """Takes snapshots of a detector: `val_samples` validation pictures at most, after `last_step` also the test part.

    Pictures that cannot be read are left out and named once.
    """

    def __init__(
        self, *, dataset: Dataset, transform: Letterbox, session: Session, batch_size: int, val_samples: int,
        seed: int, last_step: int, evaluators: Sequence[Evaluator] = (), num_pictures: int = 4,
    ) -> None:  # fmt: skip
        held_out: Any = dataset.validation()
        test: Any = DatasetTraits.of(dataset).test()
        self.has_evaluators = bool(evaluators)
        if held_out is None and self.has_evaluators:
            raise ValueError("the data set has no held-out part to evaluate on: name one, or set evaluator=[]")
        order = torch.randperm(len(held_out or ()), generator=generator(seed, 0, 0, "validation"))
        indices = sorted(order[:val_samples].tolist())
        self.num_samples = len(indices)
        """Number of pictures of each evaluation but the last."""
        self.classes = dataset.classes
        self.transform = transform
        self.session = session
        size = max(1, batch_size // IMAGES_PER_PICTURE)
        self.val = _samples(held_out, "validation", indices, size) if indices else None
        self.test = _samples(test, "test", range(len(test)), size) if test else None
        self.last_step = last_step
        self.num_pictures = num_pictures
        addition = f", and {len(test)} test pictures after the last step" if test else ""
        self.protocol = f"detection: {len(indices)} whole pictures of the validation part{addition}"

    def snapshot(self, step: int, objective: Any) -> BoxSnapshot:
        """Predictions of a detector on the session's device; none if a weight is not finite."""
        if not all(bool(weights.isfinite().all()) for weights in objective.parameters()):
            return BoxSnapshot(step, self.classes, val=(), test=(), pictures=(), is_finite=False)
        pictures: list[Tensor] = []
        with eval_mode(objective), torch.no_grad(), self.session.autocast():
            val = self._detect(objective, self.val, pictures)
            test = self._detect(objective, self.test) if step == self.last_step else []
        return BoxSnapshot(step, self.classes, val, test, pictures, is_finite=True)

    def baselines(self, snapshot: BoxSnapshot, evaluators: Sequence[Evaluator]) -> dict[str, float]:
        """Empty: raw pixels detect nothing."""
        return {}

    def _detect(self, objective: Any, samples: Samples | None, first: list[Tensor] | None = None) -> list[Detections]:
        """Detections in all samples; the first pictures are added to `first`."""
        detections: list[Detections] = []
        if samples is None:
            return detections
        with progress(len(samples.split.indices), "detecting", "picture") as advance:
            for batch in samples.batches():
                pictures, ground_truth = batch.values, batch.fields["boxes"]
                clips = self.transform([picture.to(self.session.device) for picture in pictures])
                for picture, boxes, rows in zip(pictures, ground_truth, objective.detect(clips), strict=True):
                    edges = self.transform.restore(rows[:, :4].float().cpu(), picture.shape[-2:])
                    detections.append(Detections(torch.cat([edges, rows[:, 4:].float().cpu()], dim=1), boxes))
                if first is not None:
                    first += [picture[:, 0] for picture in pictures[: self.num_pictures - len(first)]]
                advance(len(pictures))
        return detections


def _samples(dataset: Any, name: str, indices: Sequence[int], batch_size: int) -> Samples:
    split = Split(dataset=dataset, name=name, indices=tuple(indices))
    return Samples(split=split, reduce=list, batch_size=batch_size, fields=["boxes"])
