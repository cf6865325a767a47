"""Few-shot splits: a share, or a number, of the samples of each class, the smaller ones inside the larger."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from jepa.distributed import generator
from jepa.schema import ConfigError


def few(labels: Tensor, shots: float, seed: int, classes: Sequence[str]) -> Tensor:
    """[n] -> sorted rows: of each class `shots` samples, or below 1 that share of them (one at least).

    With one seed a smaller split is part of every larger one. Raises ConfigError where a class has too few.
    """
    rank = torch.rand(len(labels), generator=generator(seed, 0, 0, "shots"))
    chosen = []
    for label in labels.unique().tolist():
        rows = (labels == label).nonzero()[:, 0]
        count = int(shots) if shots >= 1 else max(1, round(shots * len(rows)))
        if count > len(rows):
            raise ConfigError(
                [f'shots={shots:g}: class "{classes[label]}" has only {len(rows)} training samples; lower shots']
            )
        chosen.append(rows[rank[rows].argsort()[:count]])
    return torch.cat(chosen).sort().values
