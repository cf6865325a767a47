"""Mean average precision of a detector, and pictures of the annotations and the predictions."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from jepa.evaluation.pictures import BLOCK_COLOURS, draw_boxes, label_tiles, montage, resize_longest_side, to_rgb
from jepa.evaluation.types import BoxSnapshot, Detections, Evaluation, Picture
from jepa.types import Share

log = logging.getLogger(__name__)
TILE = 384
"""Longest side of a picture in pixels."""
THRESHOLDS = {"map50": 0, "map75": 5}
"""Metrics with the index of their overlap (IoU) among 0.5, 0.55 ... 0.95."""


class Detection:
    """Average precision as COCO defines it, in percent: detect/map over IoUs of 0.5 to 0.95, map50, map75, and
    ap50_CLASS of each annotated class; after the last step the same on the test part, as detect/test_*.

    Pictures show predictions with a score of at least `shown_score`. Needs torchmetrics and pycocotools.
    """

    requires = ("detect", "torchmetrics", "pycocotools")
    judges = "boxes"

    def __init__(self, *, shown_score: Share = 0.5) -> None:
        missing = [name for name in ("torchmetrics", "pycocotools") if find_spec(name) is None]
        if missing:
            raise ValueError(f"evaluator=detection needs {' and '.join(missing)}: pip install 'jepa-train[detect]'")
        self.shown_score = shown_score
        self.protocol = (
            "detection: mAP of COCO (101 recall points, at most 100 detections per picture, IoU 0.5 to 0.95), in the "
            "pixels of the files, mean over the annotated classes"
        )

    def __call__(self, snapshot: BoxSnapshot) -> Evaluation:
        metrics: dict[str, float] = {}
        for name, prefix, pictures in (
            ("validation", "detect/", snapshot.val),
            ("test", "detect/test_", snapshot.test),
        ):
            values = precisions(pictures, snapshot.classes, prefix) if pictures else {}
            if pictures and not values:
                log.warning("no average precision: none of the %d %s pictures has a box", len(pictures), name)
            metrics |= values
        caption = f"Annotations on the left, predictions with a score of at least {self.shown_score:g} on the right."
        tiles = [self._pair(*pair, snapshot.classes) for pair in zip(snapshot.pictures, snapshot.val, strict=False)]
        return Evaluation(metrics=metrics, pictures=(Picture("boxes", montage(tiles), caption),) if tiles else ())

    def _pair(self, picture: Tensor, boxes: Detections, classes: Sequence[str]) -> Tensor:
        """uint8 [C, h, w] -> [2, 3, h, w]: annotations on the left, predictions on the right"""
        predictions = boxes.predictions[boxes.predictions[:, 5] >= self.shown_score]
        small, ratio = resize_longest_side(to_rgb(picture), TILE)
        tiles = []
        for rows in (boxes.ground_truth, predictions):
            labels = rows[:, 4].int().tolist()
            scores = [f" {score:.2f}" for score in rows[:, 5:].flatten().tolist()] or [""] * len(rows)
            texts = [f"{classes[label]}{score}" for label, score in zip(labels, scores, strict=True)]
            colours = [BLOCK_COLOURS[label % len(BLOCK_COLOURS)] for label in labels]
            tiles.append(draw_boxes(small, rows[:, :4] * ratio, texts, colours))
        counts = [f"{len(boxes.ground_truth)} annotated", f"{len(predictions)} detected"]
        return label_tiles(torch.stack(tiles), counts, [(0, 0, 0)] * 2)


def precisions(pictures: Sequence[Detections], classes: Sequence[str], prefix: str) -> dict[str, float]:
    """Mean average precisions by name, and that of each annotated class at an IoU of 0.5; empty without annotations."""
    from torchmetrics.detection import MeanAveragePrecision

    metric = MeanAveragePrecision(extended_summary=True)
    for predictions, ground_truth in pictures:
        metric.update(
            [{"boxes": predictions[:, :4], "labels": predictions[:, 4].long(), "scores": predictions[:, 5]}],
            [{"boxes": ground_truth[:, :4], "labels": ground_truth[:, 4].long()}],
        )
    result = metric.compute()
    precision = result["precision"][:, :, :, 0, -1]  # [IoUs, recalls, classes] for boxes of all sizes
    present = (precision >= 0).all(dim=1).all(dim=0)  # [classes]
    if not present.any():
        return {}
    average = 100 * precision[:, :, present].double().mean(dim=1)  # [IoUs, present classes]
    values = {f"{prefix}map": average.mean()} | {f"{prefix}{n}": average[i].mean() for n, i in THRESHOLDS.items()}
    numbers = result["classes"].reshape(-1)[present]  # a scalar if there is one class
    names = [re.sub(r"\W+", "_", classes[int(number)]) for number in numbers.tolist()]
    values |= {f"{prefix}ap50_{name}": value for name, value in zip(names, average[0], strict=True)}
    return {name: float(value) for name, value in values.items()}
