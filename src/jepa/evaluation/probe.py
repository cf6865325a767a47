"""Shared by the probes of frozen features: labelled samples, selection split, neighbours, scores."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from jepa.evaluation.readout import READOUTS
from jepa.evaluation.types import Evaluation, Features, Snapshot

SELECTION_SHARE = 0.2
"""Share of a probe's training samples that its hyper-parameters are chosen on."""
QUERIES_PER_CHUNK = 1024
"""Queries of a neighbour search that are compared at once, which bounds the memory."""
IMBALANCE, IMBALANCE_DEVIATIONS = 1.5, 4
"""Classes are imbalanced if the largest exceeds its fair share by this factor and by so many standard deviations."""
BALANCED = f", and the mean recall of the classes where the largest has over {IMBALANCE:g} times its fair share"


class ProbeTask(NamedTuple):
    train: Features
    val: Features
    num_classes: int
    seed: int = 0
    """Seed of the initial weights, the order of the samples and the selection split."""
    device: torch.device = torch.device("cpu")


class ProbePrediction(NamedTuple):
    predicted: Tensor
    """long [n] on the CPU: class of each validation sample"""
    chosen: Mapping[str, float] = {}
    """Hyper-parameters by name, chosen on training samples."""
    probabilities: Tensor | None = None
    """float [n, classes] on the CPU, if the probe computes them"""


def read_by(readout: str) -> str:
    """The part of a protocol that names how tokens are read, empty for their mean."""
    return "" if readout == "mean" else f"; tokens are read by readout={readout}: {READOUTS[readout]}"


class ClassProbe:
    """A probe of class labels: subclasses implement `predict`. Without usable labels it warns once and reports nothing.

    `method` describes the fit, `protocol` also the metrics of a run.
    """

    judges = "features"

    def __init__(self, *, name: str, protocol: str, readout: str = "mean") -> None:
        self.name = name
        self.method = protocol
        self.readout = readout
        self.protocol = (
            f"{protocol}{read_by(readout)}; top-1 micro accuracy in percent on the validation samples{BALANCED}"
        )
        self._warned = False

    def __call__(self, snapshot: Snapshot) -> Evaluation:
        metrics = {}
        for prefix, train, val in feature_pairs(snapshot):
            task = self.task(train.by(self.readout), val.by(self.readout))
            if task is None:
                return Evaluation()
            metrics |= scores(f"{prefix}/{self.name}", self.predict(task).predicted, task)
        return Evaluation(metrics=metrics)

    def task(self, train: Features, val: Features) -> ProbeTask | None:
        """None, with a warning the first time, if there is nothing to learn."""
        task = probe_task(train, val)
        if isinstance(task, ProbeTask):
            return task
        if not self._warned:
            logging.getLogger(__name__).warning("%s probe skipped: %s", self.name, task)
        self._warned = True
        return None

    def predict(self, task: ProbeTask) -> ProbePrediction:
        raise NotImplementedError


def feature_pairs(snapshot: Snapshot) -> Iterator[tuple[str, Features, Features]]:
    """Metric prefix, training and validation features: of the samples, and of still clips if the snapshot has them."""
    yield "probe", snapshot.train, snapshot.val
    if snapshot.still is not None:
        yield "still", *snapshot.still


def select(features: Features, rows: Tensor) -> Features:
    """The samples of indices [m] or of a mask bool [n]."""
    readouts = {name: vectors[rows] for name, vectors in features.readouts.items()}
    columns = (None if column is None else column[rows] for column in features[:-1])
    return Features(*columns, readouts=readouts)  # pyright: ignore[reportArgumentType]


def probe_task(train: Features, val: Features) -> ProbeTask | str:
    """The labelled samples of both parts, or the reason why they cannot be probed."""
    train, val = (select(part, part.labels >= 0) for part in (train, val))
    if len(train.labels) == 0 or len(val.labels) == 0:
        return "the data set has no labels"
    if len(train.labels.unique()) < 2:
        return f"all {len(train.labels)} labelled training samples are of one class"
    return ProbeTask(train, val, int(max(train.labels.max(), val.labels.max())) + 1)


def standardise(train: Features, val: Features, device: torch.device | str = "cpu") -> tuple[Features, Features]:
    """Zero mean and unit deviation per dimension by the training samples; on the device, without tokens."""
    mean, deviation = train.vectors.mean(0), train.vectors.std(0, correction=0).clamp_min(1e-6)
    train, val = (
        Features(((part.vectors - mean) / deviation).to(device), part.labels.to(device), part.targets)
        for part in (train, val)
    )
    return train, val


def selection_split(train: Features, seed: int = 0) -> tuple[Features, Features]:
    """Training samples to fit on, and the SELECTION_SHARE to choose hyper-parameters on; pure in the seed."""
    order = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(seed))
    num_selection = max(1, round(SELECTION_SHARE * len(order)))
    return select(train, order[num_selection:]), select(train, order[:num_selection])


def scores(name: str, predicted: Tensor, task: ProbeTask) -> dict[str, float]:
    """NAME_top1, and NAME_balanced if the classes are imbalanced."""
    labels = task.val.labels
    metrics = {f"{name}_top1": top1(predicted, labels)}
    if is_imbalanced(torch.cat([task.train.labels, labels])):
        metrics[f"{name}_balanced"] = balanced(predicted, labels)
    return metrics


def constant_scores(train: Features, val: Features) -> dict[str, float]:
    """constant_top1 of always naming the largest class of the training samples; empty without labels."""
    task = probe_task(train, val)
    if isinstance(task, str):
        return {}
    return scores("constant", torch.full_like(task.val.labels, int(task.train.labels.mode().values)), task)


def is_imbalanced(labels: Tensor) -> bool:
    """[n] -> whether the largest class is clearly above its fair share, beyond the noise of sampling."""
    counts = labels.bincount()
    fair = len(labels) / int((counts > 0).sum())
    return int(counts.max()) > max(IMBALANCE * fair, fair + IMBALANCE_DEVIATIONS * fair**0.5)


def top1(predicted: Tensor, labels: Tensor) -> float:
    """[n], [n] -> micro accuracy: share of correct samples in percent"""
    return 100.0 * int((predicted == labels).sum()) / len(labels)


def balanced(predicted: Tensor, labels: Tensor) -> float:
    """[n], [n] -> mean recall in percent of the classes in `labels`"""
    recalls = [top1(predicted[labels == label], labels[labels == label]) for label in labels.unique()]
    return sum(recalls) / len(recalls)


def confusion_counts(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """[n], [n] -> long [classes, classes]: counts of each label (row) and prediction; label -1 is left out"""
    labelled = labels >= 0
    pairs = labels[labelled] * num_classes + predicted[labelled]
    return pairs.bincount(minlength=num_classes**2).unflatten(0, (num_classes, num_classes))


def nearest(queries: Tensor, bank: Tensor, k: int, *, exclude_self: bool = False) -> tuple[Tensor, Tensor]:
    """[q, D], [n, D] -> indices and cosine similarities [q, min(k, n)] of the nearest vectors of the bank, best first.

    With `exclude_self`, query i is vector i of the bank and not its own neighbour.
    """
    bank = F.normalize(bank, dim=1)
    neighbours = []
    for number, chunk in enumerate(F.normalize(queries, dim=1).split(QUERIES_PER_CHUNK)):
        similarity = chunk @ bank.T
        if exclude_self:
            similarity[:, number * QUERIES_PER_CHUNK :].fill_diagonal_(-torch.inf)
        neighbours.append(similarity.topk(min(k, len(bank)), dim=1))
    return torch.cat([part.indices for part in neighbours]), torch.cat([part.values for part in neighbours])


def exp_entropy(values: Tensor) -> float:
    """[n], at least 0 -> exp(-sum p log p) with p = values / sum: their effective number, 1 if all are 0"""
    total = values.sum()
    if total == 0:
        return 1.0
    return (values / total).xlogy(values / total).sum().neg().exp().item()
