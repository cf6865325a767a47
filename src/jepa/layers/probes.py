"""What the probes of frozen features share: which samples count, and how an answer is scored."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from jepa.types import Features, Snapshot


class ProbeTask(NamedTuple):
    train: Features
    val: Features
    num_classes: int


def labelled(features: Features) -> Features:
    """[n, D] -> [m, D]: the samples that have a label."""
    known = features.labels >= 0
    return Features(features.vectors[known], features.labels[known])


def probe_task(snapshot: Snapshot) -> ProbeTask | str:
    """The labelled samples of both parts, or the reason why no probe is possible."""
    train, val = labelled(snapshot.train), labelled(snapshot.val)
    if len(train.labels) == 0 or len(val.labels) == 0:
        return "the data set has no labels"
    if len(train.labels.unique()) < 2:
        return f"all {len(train.labels)} labelled training samples are of one class"
    return ProbeTask(train, val, int(max(train.labels.max(), val.labels.max())) + 1)


def top1(predicted: Tensor, labels: Tensor) -> float:
    """[n], [n] -> micro accuracy: the share of samples that are right, in percent."""
    return 100.0 * int((predicted == labels).sum()) / len(labels)
