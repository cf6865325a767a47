"""What a detector finds in the held-out pictures: whole ones, in the pixels of their files."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from jepa.errors import Interrupted
from jepa.evaluation.samples import evaluating
from jepa.evaluation.types import BoxSnapshot, Detections, Evaluator
from jepa.seeding import generator
from jepa.types import Sample

log = logging.getLogger(__name__)
SILENT_SECONDS = 5
"""an evaluation that takes longer shows a bar on a terminal"""
FRAMES_OF_ONE = 16
"""that the maps of a pyramid weigh: so many fewer pictures are looked at at once than `evaluation.batch_size` says"""


class Whole(Protocol):
    def __call__(self, pictures: Sequence[Tensor]) -> Tensor:
        """uint8 [C, 1, H, W] of any sizes -> clips [B, C, 1, h, w]"""
        ...

    def restore(self, boxes: Tensor, size: Sequence[int]) -> Tensor:
        """[n, 4] in a clip -> in the picture of height and width"""
        ...


class BoxProber:
    """Takes snapshots of a detector on the whole validation part, of more than `val_samples` on as many of them.

    The test part is looked at after `last_step` alone. Pictures that cannot be read are left out and named once.
    """

    def __init__(
        self, *, dataset: Any, transform: Whole, device: torch.device | str, batch_size: int, val_samples: int,
        seed: int, last_step: int, evaluators: Sequence[Evaluator] = (),
        autocast: Callable[[], AbstractContextManager] = nullcontext, num_pictures: int = 4,
    ) -> None:  # fmt: skip
        held_out: Any = dataset.validation()
        test: Any = dataset.test()
        self.is_asked = bool(evaluators)
        if held_out is None and self.is_asked:
            raise ValueError("the data set has no held-out part to judge a detector on: name one, or take evaluator=[]")
        self.val, self.test = held_out, test
        self.indices: list[int] = []
        if held_out is not None:
            order = torch.randperm(len(held_out), generator=generator(seed, 0, 0, "validation"))
            self.indices = sorted(order[:val_samples].tolist())
        self.classes = dataset.classes
        self.transform = transform
        self.device = torch.device(device)
        self.batch_size = max(1, batch_size // FRAMES_OF_ONE)
        self.last_step = last_step
        self.autocast = autocast
        self.num_pictures = num_pictures
        self._told: set[str] = set()
        beside = f", and {len(self.test)} test pictures after the last step" if self.test else ""
        self.protocol = f"detection: {len(self.indices)} whole pictures of the validation part{beside}"

    @property
    def num_samples(self) -> int:
        """How many pictures each evaluation looks at, but for the last."""
        return len(self.indices)

    def snapshot(self, step: int, objective: Any, should_stop: Callable[[], bool] = lambda: False) -> BoxSnapshot:
        """Of a detector on this prober's device.

        `should_stop` is asked between batches; where it says so, Interrupted is raised.
        """
        is_finite = all(bool(weights.isfinite().all()) for weights in objective.parameters())
        with evaluating(objective), torch.no_grad(), self.autocast():
            look = self._findings if is_finite else lambda *_: ()
            val = look(objective, self.val, self.indices, should_stop)
            ends = step == self.last_step and self.test is not None
            test = look(objective, self.test, range(len(self.test or ())), should_stop) if ends else ()
        shown = [s.clip[:, 0] for s in self._read(self.val, self.indices[: self.num_pictures])]
        return BoxSnapshot(step, self.classes, val, test, shown, is_finite)

    def baselines(self, snapshot: BoxSnapshot, evaluators: Sequence[Evaluator]) -> dict[str, float]:
        """None: pixels alone find nothing."""
        return {}

    def _findings(
        self, objective: Any, dataset: Any, indices: Sequence[int], should_stop: Callable[[], bool]
    ) -> list[Detections]:
        found = []
        with tqdm(
            total=len(indices), desc="detecting", unit="picture", delay=SILENT_SECONDS, leave=False, disable=None
        ) as bar:
            for start in range(0, len(indices), self.batch_size):
                some = list(self._read(dataset, indices[start : start + self.batch_size]))
                if not some:
                    continue
                clips = self.transform([sample.clip.to(self.device) for sample in some])
                for sample, rows in zip(some, objective.find(clips), strict=True):
                    edges = self.transform.restore(rows[:, :4].float().cpu(), sample.clip.shape[-2:])
                    found.append(
                        Detections(torch.cat([edges, rows[:, 4:].float().cpu()], dim=1), sample.fields["boxes"])
                    )
                bar.update(len(some))
                if should_stop():
                    raise Interrupted("the evaluation was asked to stop")
        return found

    def _read(self, dataset: Any, indices: Sequence[int]) -> Iterator[Sample]:
        for index in indices:
            try:
                yield Sample(*dataset[index])
            except (OSError, RuntimeError) as fault:
                if (name := dataset.describe(index)) not in self._told:
                    log.warning("evaluation leaves out %s: %s", name, fault)
                    self._told.add(name)
