"""task=inspect: the page on an encoder, with the features of jepa-eval and its linear probe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from jepa.data.transforms import EvalTransform
from jepa.downstream.cache import FeatureCache
from jepa.downstream.inspect import Subject
from jepa.downstream.inspect_page import write_page
from jepa.downstream.reading import Parts
from jepa.downstream.representation import Encoded, Frozen
from jepa.evaluation.linear import LinearProbe
from jepa.layers.probe_samples import thumbnails
from jepa.layers.probes import ProbeTask, select

NUM_PICTURES = 32


@dataclass(frozen=True)
class Thumbnails:
    """Small pictures instead of vectors, so that they are read as features are."""

    transform: EvalTransform
    digest = "thumbnails"

    def reduce(self, clips: Sequence[Tensor]) -> Tensor:
        return thumbnails(self.transform.pictures(clips))

    def encode(self, values: Tensor, max_tokens: int) -> Encoded:
        return Encoded(values)


def inspect(folder: Path, title: str, representation: Frozen, parts: Parts, cache: FeatureCache) -> Path:
    """Write FOLDER/inspect.html; test samples are shown in a random order, always the same."""
    train, test = (cache.features(title, representation, part) for part in (parts.train, parts.test))
    small = FeatureCache(None, cache.batch_size)
    shown = [small.features("pictures", Thumbnails(representation.transform), part) for part in parts[:2]]
    probe = LinearProbe()
    answer = probe.answer(ProbeTask(train, test, len(parts.classes), device=representation.session.device))
    assert answer.probabilities is not None
    order = torch.randperm(len(test.labels), generator=torch.Generator().manual_seed(0))
    readable = torch.tensor([row for row, index in enumerate(parts.test.indices) if index not in parts.test.broken])
    first = parts.test.take(readable[order[:NUM_PICTURES]])
    pictures = torch.cat([chunk.values for chunk in first.read(representation.reduce, NUM_PICTURES)])
    folder.mkdir(parents=True, exist_ok=True)
    subject = Subject(
        title=title, encoder=representation.encoder, train=train, test=select(test, order), pictures=pictures,
        train_thumbnails=shown[0].vectors, test_thumbnails=shown[1].vectors[order], classes=parts.classes,
        probabilities=answer.probabilities[order],
        protocol=(f"data: {parts.told}", f"features: {representation.told}", f"probe: {probe.method}"),
    )  # fmt: skip
    return write_page(folder, subject)
