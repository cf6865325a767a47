"""Mean average precision of a detector, and pictures of what it finds beside what is annotated."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from jepa.evaluation.pictures import BLOCK_COLOURS, fit_inside, labelled_tiles, montage, outlined, to_rgb
from jepa.evaluation.types import BoxSnapshot, Detections, Evaluation, Picture
from jepa.types import Share

TILE = 384
"""longest side of a picture that is shown"""
THRESHOLDS = {"map50": 0, "map75": 5}
"""metric -> its place among the overlaps 0.5, 0.55 ... 0.95"""


class Detection:
    """Average precision as COCO defines it, in percent: detect/map over overlaps of 0.5 to 0.95, map50, map75, and
    ap50_CLASS of each class that is annotated; after the last step the same of the test part, as detect/test_*.

    Pictures show findings with a score of `shown_score` or more. Needs torchmetrics and pycocotools.
    """

    judges = "boxes"

    def __init__(self, *, shown_score: Share = 0.5) -> None:
        lacking = [name for name in ("torchmetrics", "pycocotools") if find_spec(name) is None]
        if lacking:
            raise ValueError(f"evaluator=detection needs {' and '.join(lacking)}: pip install 'jepa-train[detect]'")
        self.shown_score = shown_score
        self.protocol = (
            "detection: mAP as COCO has it (101 points of recall, at most 100 findings a picture, overlaps 0.5 to "
            "0.95), in the pixels of the files, mean over the classes that are annotated there"
        )

    def __call__(self, snapshot: BoxSnapshot) -> Evaluation:
        metrics = precisions(snapshot.val, snapshot.classes, "detect/")
        if snapshot.test:
            metrics |= precisions(snapshot.test, snapshot.classes, "detect/test_")
        caption = f"Left what is annotated, right what is found with a score of at least {self.shown_score:g}."
        tiles = [self._pair(*pair, snapshot.classes) for pair in zip(snapshot.pictures, snapshot.val, strict=False)]
        return Evaluation(metrics=metrics, pictures=(Picture("boxes", montage(tiles), caption),) if tiles else ())

    def _pair(self, picture: Tensor, boxes: Detections, classes: Sequence[str]) -> Tensor:
        """uint8 [C, h, w] -> [2, 3, h, w]"""
        found = boxes.found[boxes.found[:, 5] >= self.shown_score]
        scores = [f"{score:.2f}" for score in found[:, 5].tolist()]
        small, ratio = fit_inside(to_rgb(picture[None])[0], TILE)
        tiles = []
        for rows, numbers in ((boxes.annotated, [""] * len(boxes.annotated)), (found, scores)):
            names = [classes[int(number)] for number in rows[:, 4]]
            texts = [f"{name} {number}".strip() for name, number in zip(names, numbers, strict=True)]
            colours = [BLOCK_COLOURS[int(number) % len(BLOCK_COLOURS)] for number in rows[:, 4]]
            tiles.append(outlined(small, rows[:, :4] * ratio, texts, colours))
        lines = [f"{len(boxes.annotated)} annotated", f"{len(found)} found"]
        return labelled_tiles(torch.stack(tiles), lines, [(0, 0, 0)] * 2)


def precisions(pictures: Sequence[Detections], classes: Sequence[str], prefix: str) -> dict[str, float]:
    """Mean average precisions and that of each class at an overlap of 0.5, by name; -1 of COCO becomes no entry."""
    from torchmetrics.detection import MeanAveragePrecision

    metric = MeanAveragePrecision(extended_summary=True)
    for found, annotated in pictures:
        metric.update(
            [{"boxes": found[:, :4], "labels": found[:, 4].long(), "scores": found[:, 5]}],
            [{"boxes": annotated[:, :4], "labels": annotated[:, 4].long()}],
        )
    result = metric.compute()
    precision = result["precision"][:, :, :, 0, -1]  # [overlaps, recalls, classes], of boxes of all sizes
    present = (precision >= 0).all(dim=1).all(dim=0)  # [classes], that are annotated
    if not present.any():
        return {}
    average = 100 * precision[:, :, present].double().mean(dim=1)  # [overlaps, present classes]
    values = {f"{prefix}map": average.mean()} | {f"{prefix}{n}": average[at].mean() for n, at in THRESHOLDS.items()}
    numbers = result["classes"].reshape(-1)[present]  # of a single class it is no list
    names = [re.sub(r"\W+", "_", classes[int(number)]) for number in numbers.tolist()]
    values |= {f"{prefix}ap50_{name}": value for name, value in zip(names, average[0], strict=True)}
    return {name: float(value) for name, value in values.items()}
