"""Weighted nearest neighbours on frozen features: a probe without any training (Wu et al. 2018, section 3.4; DINO)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from jepa.evaluation.probe import Answer, ClassProbe, ProbeTask
from jepa.types import Positive, PositiveInt

ROWS = 1024
"""queries compared at once, so that memory does not grow with the validation part"""


class KNN(ClassProbe):
    """Each of the k nearest training samples votes for its class with weight exp(cosine similarity / temperature)."""

    def __init__(self, *, k: PositiveInt, temperature: Positive) -> None:
        self.k = k
        self.temperature = temperature
        protocol = (
            f"kNN: the {k} nearest training samples by cosine similarity vote with weight "
            f"exp(similarity / {temperature:g})"
        )
        super().__init__(name="knn", protocol=protocol)

    def answer(self, task: ProbeTask) -> Answer:
        queries, bank, labels = (
            part.to(task.device) for part in (task.val.vectors, task.train.vectors, task.train.labels)
        )
        votes = knn_votes(queries, bank, labels, num_classes=task.num_classes, k=self.k, temperature=self.temperature)
        return Answer(votes.argmax(1).cpu())


def knn_votes(queries: Tensor, bank: Tensor, labels: Tensor, *, num_classes: int, k: int, temperature: float) -> Tensor:
    """[q, D], [n, D], [n] -> [q, classes], each row summing to one."""
    bank = F.normalize(bank, dim=1)
    rows = []
    for some in F.normalize(queries, dim=1).split(ROWS):
        similarity, nearest = (some @ bank.T).topk(min(k, len(bank)), dim=1)  # [r, k]
        weights = (similarity / temperature).softmax(1)
        rows.append(weights.new_zeros(len(some), num_classes).scatter_add_(1, labels[nearest], weights))
    return torch.cat(rows)
