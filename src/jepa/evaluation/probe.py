"""What the probes of frozen features share: which samples count, who is near, how predictions are scored."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from jepa.evaluation.types import Evaluation, Features, Snapshot
from jepa.types import PatchGrid

SELECTION_SHARE = 0.2
"""of a probe's training samples, on which its hyper-parameters are chosen"""
QUERIES = 1024
"""vectors whose neighbours are looked for at once, so that memory does not grow with their number"""
UNEVEN, UNEVEN_DEVIATIONS = 1.5, 4
BALANCED = f", and the mean recall of the classes where the largest has over {UNEVEN:g} times its fair share"


class ProbeTask(NamedTuple):
    train: Features
    val: Features
    num_classes: int
    seed: int = 0
    """of what a probe draws: its first weights, its order, the samples that it chooses on"""
    device: torch.device = torch.device("cpu")
    """where a probe computes"""


class Prediction(NamedTuple):
    predicted: Tensor
    """long [n] on the CPU: the class of each validation sample"""
    chosen: Mapping[str, float] = {}
    """hyper-parameters that were chosen on training samples, by name"""
    probabilities: Tensor | None = None
    """float [n, classes] on the CPU, of a probe that gives them"""


class ClassProbe:
    """A probe of class labels: subclasses implement `predict`. Without usable labels it warns once and reports nothing.

    `method` says what is done with training samples, `protocol` also what is measured in a run.
    """

    judges = "features"

    def __init__(self, *, name: str, protocol: str) -> None:
        self.name = name
        self.method = protocol
        self.protocol = f"{protocol}; top-1 micro accuracy in percent on the validation samples{BALANCED}"
        self._warned = False

    def __call__(self, snapshot: Snapshot) -> Evaluation:
        metrics = {}
        for prefix, train, val in probed(snapshot):
            task = self.task(train, val)
            if task is None:
                return Evaluation()
            metrics |= scores(f"{prefix}/{self.name}", self.predict(task).predicted, task)
        return Evaluation(metrics=metrics)

    def task(self, train: Features, val: Features) -> ProbeTask | None:
        """None where there is nothing to learn."""
        task = probe_task(train, val)
        if isinstance(task, ProbeTask):
            return task
        if not self._warned:
            logging.getLogger(__name__).warning("%s probe skipped: %s", self.name, task)
        self._warned = True
        return None

    def predict(self, task: ProbeTask) -> Prediction:
        raise NotImplementedError


def probed(snapshot: Snapshot) -> Iterator[tuple[str, Features, Features]]:
    """Prefix of the metrics, train and val: of the samples, and of their middle frames where there are more."""
    yield "probe", snapshot.train, snapshot.val
    if snapshot.still is not None:
        yield "still", *snapshot.still


def select(features: Features, rows: Tensor) -> Features:
    """Indices [m] or bool [n] -> the m samples."""
    targets, tokens = (part if part is None else part[rows] for part in (features.targets, features.tokens))
    return Features(features.vectors[rows], features.labels[rows], targets, tokens)


def on_device(features: Features, device: torch.device) -> Features:
    """Vectors and labels alone."""
    return Features(features.vectors.to(device), features.labels.to(device))


def probe_task(train: Features, val: Features) -> ProbeTask | str:
    """The labelled samples of both parts, or the reason why no probe is possible."""
    train, val = (select(part, part.labels >= 0) for part in (train, val))
    if len(train.labels) == 0 or len(val.labels) == 0:
        return "the data set has no labels"
    if len(train.labels.unique()) < 2:
        return f"all {len(train.labels)} labelled training samples are of one class"
    return ProbeTask(train, val, int(max(train.labels.max(), val.labels.max())) + 1)


def standardise(train: Features, val: Features) -> tuple[Features, Features]:
    """Zero mean and unit deviation in each dimension, by the statistics of the training samples."""
    mean, deviation = train.vectors.mean(0), train.vectors.std(0, correction=0).clamp_min(1e-6)
    train, val = (part._replace(vectors=(part.vectors - mean) / deviation) for part in (train, val))
    return train, val


def held_out(num: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Indices of the samples to fit on and of those to choose hyper-parameters on, always the same."""
    order = torch.randperm(num, generator=torch.Generator().manual_seed(seed))
    num_held_out = max(1, round(SELECTION_SHARE * num))
    return order[num_held_out:], order[:num_held_out]


def scores(name: str, predicted: Tensor, task: ProbeTask) -> dict[str, float]:
    """NAME_top1, and NAME_balanced where the classes are uneven."""
    labels = task.val.labels
    metrics = {f"{name}_top1": top1(predicted, labels)}
    if is_uneven(torch.cat([task.train.labels, labels])):
        metrics[f"{name}_balanced"] = balanced(predicted, labels)
    return metrics


def is_uneven(labels: Tensor) -> bool:
    """[n] -> whether the largest class is well above its fair share, more than a sample of equal ones would be."""
    counts = labels.bincount()
    fair = len(labels) / int((counts > 0).sum())
    return int(counts.max()) > max(UNEVEN * fair, fair + UNEVEN_DEVIATIONS * fair**0.5)


def top1(predicted: Tensor, labels: Tensor) -> float:
    """[n], [n] -> micro accuracy: the share of samples that are right, in percent."""
    return 100.0 * int((predicted == labels).sum()) / len(labels)


def balanced(predicted: Tensor, labels: Tensor) -> float:
    """[n], [n] -> mean recall of the classes that `labels` has, in percent."""
    recalls = [top1(predicted[labels == label], labels[labels == label]) for label in labels.unique()]
    return sum(recalls) / len(recalls)


def confusion_counts(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """[n], [n] -> long [classes, classes]: how often a label (row) was taken for each class; label -1 is left out."""
    labelled = labels >= 0
    pairs = labels[labelled] * num_classes + predicted[labelled]
    return pairs.bincount(minlength=num_classes**2).unflatten(0, (num_classes, num_classes))


def nearest(queries: Tensor, bank: Tensor, k: int, *, others: bool = False) -> tuple[Tensor, Tensor]:
    """[q, D], [n, D] -> indices and cosine similarities [q, min(k, n)] of the nearest of the bank, best first.

    With `others`, query i is number i of the bank and no neighbour of itself.
    """
    bank = F.normalize(bank, dim=1)
    found = []
    for number, some in enumerate(F.normalize(queries, dim=1).split(QUERIES)):
        similarity = some @ bank.T
        if others:
            similarity[:, number * QUERIES :].fill_diagonal_(-torch.inf)
        found.append(similarity.topk(min(k, len(bank)), dim=1))
    return torch.cat([part.indices for part in found]), torch.cat([part.values for part in found])


def pool_tokens(tokens: Tensor, grid: PatchGrid, most: int) -> Tensor:
    """[b, N, D] -> [b, J, D], J <= most: neighbours on the grid are averaged."""
    full, size = (grid.t, grid.h, grid.w), coarser(grid, most)
    if size == full:
        return tokens
    return F.adaptive_avg_pool3d(tokens.mT.unflatten(2, full), size).flatten(2).mT


def coarser(grid: PatchGrid, most: int) -> tuple[int, int, int]:
    """Time, height and width, halved (rounded up) where they are longest, space first, until `most` places are left."""
    t, h, w = grid.t, grid.h, grid.w
    while t * h * w > most:
        if max(h, w) >= t:
            h, w = (h + 1) // 2, (w + 1) // 2
        else:
            t = (t + 1) // 2
    return t, h, w
