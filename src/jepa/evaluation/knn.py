"""Weighted k-nearest-neighbour vote on frozen features, without training (Wu et al. 2018, section 3.4; DINO)."""

from __future__ import annotations

from torch import Tensor

from jepa.evaluation.probe import ClassProbe, ProbePrediction, ProbeTask, nearest
from jepa.types import Positive, PositiveInt, Readout


class KNN(ClassProbe):
    """Each of the k nearest training samples votes for its class with weight exp(cosine similarity / temperature)."""

    def __init__(self, *, k: PositiveInt, temperature: Positive, readout: Readout = "mean") -> None:
        self.k = k
        self.temperature = temperature
        protocol = (
            f"kNN: the {k} nearest training samples by cosine similarity vote with weight "
            f"exp(similarity / {temperature:g})"
        )
        super().__init__(name="knn", protocol=protocol, readout=readout)

    def predict(self, task: ProbeTask) -> ProbePrediction:
        queries, bank, labels = (
            part.to(task.device) for part in (task.val.vectors, task.train.vectors, task.train.labels)
        )
        votes = knn_votes(queries, bank, labels, num_classes=task.num_classes, k=self.k, temperature=self.temperature)
        return ProbePrediction(votes.argmax(1).cpu())


def knn_votes(queries: Tensor, bank: Tensor, labels: Tensor, *, num_classes: int, k: int, temperature: float) -> Tensor:
    """[q, D], [n, D], [n] -> [q, classes], rows sum to one"""
    neighbours, similarity = nearest(queries, bank, k)
    weights = (similarity / temperature).softmax(1)
    return weights.new_zeros(len(queries), num_classes).scatter_add_(1, labels[neighbours], weights)
