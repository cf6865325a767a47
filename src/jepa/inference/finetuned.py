"""A fine-tuned run with its head: names of classes with probabilities, or boxes with scores."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from jepa.config import factory
from jepa.config.heads import BOXES, head_of
from jepa.data.box_transforms import Letterbox
from jepa.data.decode import ImageSource, as_pixels
from jepa.data.transforms import EvalTransform
from jepa.encoders.pretrained import open_encoder
from jepa.runs.checkpoint import CheckpointError, as_checkpoint_errors, find, load_model, read_state
from jepa.runs.metrics import read_config


class Prediction(NamedTuple):
    """A class, or a box of one."""

    name: str
    """of the class"""
    score: float
    """probability of the class, or score of the box"""
    box: tuple[float, float, float, float] | None = None
    """left, top, right, bottom in pixels of the picture, which is upright by its EXIF tag"""


class Finetuned(nn.Module):
    """Encoder and head of a run of jepa-finetune, in eval mode and frozen."""

    def __init__(self, objective: Any, encoder: Any, classes: Sequence[str]) -> None:
        super().__init__()
        self.objective, self.classes = objective, tuple(classes)
        self.clip_shape, self.grid_of = encoder.clip_shape, encoder.grid_of
        self.transform: EvalTransform = encoder.transform
        normalise = self.transform.normalise
        self.letterbox = Letterbox(image_size=self.transform.image_size, mean=normalise.mean, std=normalise.std)

    @property
    def finds_boxes(self) -> bool:
        return self.objective.predicts == BOXES

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def prepare(self, clips: Sequence[Tensor]) -> Any:
        """uint8 [C, T, H, W] of any size -> the input of `predict_prepared`; runs in a worker."""
        return list(clips) if self.finds_boxes else self.transform.pictures(clips)

    def predict(
        self, images: ImageSource | Sequence[ImageSource], *, top: int = 1, min_score: float = 0.5
    ) -> list[list[Prediction]]:
        """For each image: the `top` classes, or the boxes with a score of at least `min_score`, best first.

        Images are uint8 tensors [C, H, W], arrays of numpy [H, W, C], images of Pillow or paths, of any sizes.
        """
        given: Any = images if isinstance(images, list | tuple) else [images]
        pixels = [as_pixels(image, self.clip_shape[0]) for image in given]
        clips = [image if image.ndim == 4 else image.unsqueeze(1) for image in pixels]
        return self.predict_prepared(self.prepare(clips), top=top, min_score=min_score)

    @torch.no_grad()
    def predict_prepared(self, values: Any, *, top: int = 1, min_score: float = 0.5) -> list[list[Prediction]]:
        """As `predict`, of what `prepare` returns."""
        if self.finds_boxes:
            return [self._boxes(picture, min_score) for picture in self._detect(values)]
        clips = self.transform.normalise(values.to(self.device).float())
        logits = self.objective.classify(self.objective.backbone(clips))
        best = logits.float().softmax(dim=1).topk(min(top, len(self.classes)), dim=1)
        rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [[Prediction(self.classes[k], p) for k, p in zip(*row, strict=True)] for row in rows]

    def _detect(self, pictures: Sequence[Tensor]) -> list[Tensor]:
        """Boxes in the pixels of their pictures: float32 [n, 6], left, top, right, bottom, class, score."""
        found = self.objective.detect(self.letterbox([picture.to(self.device) for picture in pictures]))
        edges = [
            self.letterbox.restore(rows[:, :4].float(), picture.shape[-2:])
            for picture, rows in zip(pictures, found, strict=True)
        ]
        return [torch.cat([box, rows[:, 4:].float()], dim=1).cpu() for box, rows in zip(edges, found, strict=True)]

    def _boxes(self, rows: Tensor, min_score: float) -> list[Prediction]:
        rows = rows[rows[:, 5].argsort(descending=True, stable=True)]
        return [
            Prediction(self.classes[int(label)], score, (left, top, right, bottom))
            for left, top, right, bottom, label, score in rows.tolist()
            if score >= min_score
        ]


def load_finetuned(path_or_name: str | os.PathLike) -> Finetuned:
    """Encoder and head of a run of jepa-finetune or a checkpoint of it, on the CPU; see `Finetuned.predict`.

    Raises CheckpointError for a run without a head. Only the heads of this package are built.
    """
    checkpoint = find(Path(path_or_name).expanduser())
    state, config = read_state(checkpoint), read_config(checkpoint, {"objective": dict})
    classes = (state.get("data") or {}).get("classes") or ()
    if not head_of(config) or not classes:
        raise CheckpointError(f"{checkpoint} has no head; train one with jepa-finetune run={path_or_name}")
    with as_checkpoint_errors(f"{checkpoint}: "):
        encoder: Any = open_encoder(checkpoint)
        objective = _objective(config["objective"], encoder, classes)
    try:
        objective.load_state_dict(load_model(checkpoint))
    except RuntimeError as error:
        raise CheckpointError(f"{checkpoint}: {' '.join(str(error).split())[:240]}") from error
    return Finetuned(objective, encoder, classes).eval().requires_grad_(False)


def _objective(node: dict[str, Any], encoder: nn.Module, classes: Sequence[str]) -> Any:
    """The objective of a stored node, whose values must be plain. Raises ValueError for others."""
    names = inspect.signature(resolve_name(node["_target_"])).parameters.keys() - {"encoder", "classes"}
    if unknown := [key for key in node if key not in names and key != "_target_"]:
        raise ValueError(f"config.yaml: objective.{unknown[0]} is unknown")
    if nested := [key for key, value in node.items() if isinstance(value, dict | list)]:
        raise ValueError(f"config.yaml: objective.{nested[0]} is no plain value")
    return factory(node)(encoder=encoder, classes=classes)
