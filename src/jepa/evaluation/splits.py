"""Which samples probes are fitted on and scored on: during training, and in jepa-eval, which has labels for all."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from jepa.data.loader import choose_num_workers
from jepa.errors import ConfigError
from jepa.evaluation.samples import PIXELS_SIDE, Samples, Split
from jepa.seeding import generator
from jepa.types import Dataset, DatasetTraits, Field


class ProbeSplits(NamedTuple):
    train: Split
    val: Split
    protocol: str

    @property
    def quantities(self) -> tuple[str, ...]:
        """What both parts measure."""
        declared = (DatasetTraits.of(split.dataset).fields for split in (self.train, self.val))
        train, val = (fields.get("quantities", Field()).names for fields in declared)
        return train if train == val else ()


def probe_splits(dataset: Dataset, *, train_samples: int, val_samples: int, seed: int) -> ProbeSplits:
    """The probe's two parts, drawn uniformly without replacement, labelled samples first: pure in its arguments.

    The validation part comes from `dataset.validation()`, or where there is none from samples of the training set that
    the probe is not fitted on, nor on others of the same `dataset.source(index)`, as of one video.
    """
    if min(train_samples, val_samples) < 1:
        raise ValueError(f"train_samples={train_samples}, val_samples={val_samples}: each must be at least 1")
    if len(dataset) < 2:
        raise ValueError(f"a probe needs at least 2 training samples, the data set has {len(dataset)}")
    order, others = _shuffled(dataset, seed, "probe")
    held_out = dataset.validation()
    if held_out is not None:
        labelled, unlabelled = _shuffled(held_out, seed, "validation")
        val_indices = (labelled + unlabelled)[:val_samples]
        source = "of the validation set"
    else:
        num_val = min(val_samples, max(1, len(dataset) // 4))
        num_labelled = min(num_val, max(1, len(order) // 4) if order else 0)
        num_others = min(num_val - num_labelled, len(others))
        val_indices = order[:num_labelled] + others[:num_others]
        val_sources = {_source(dataset, index) for index in val_indices}
        order, others = ([i for i in part if _source(dataset, i) not in val_sources] for part in (order, others))
        if not order and not others:
            raise ValueError(
                f"the probe has no samples of its own: all are of the {len(val_sources)} sources of its validation "
                f"part; lower evaluation.val_samples={val_samples}, or give a held-out part"
            )
        source = "held out of the training set (the encoder sees these images, never their labels)"
    train = Split(dataset=dataset, name="training", indices=tuple((order + others)[:train_samples]))
    val = Split(dataset=dataset if held_out is None else held_out, name="validation", indices=tuple(val_indices))
    protocol = (
        "features: the encoder's output tokens in eval mode, averaged over the sample, no augmentation; "
        f"probes are fitted on {len(train.indices):,} samples of the training set and scored on "
        f"{len(val.indices):,} samples {source}, both drawn at random once (seed {seed}); "
        f"raw pixels are reduced to at most {PIXELS_SIDE} a side"
    )
    return ProbeSplits(train, val, protocol)


def _source(dataset: Dataset, index: int) -> int:
    """What a sample is taken from: samples of one source are no test of each other."""
    source = DatasetTraits.of(dataset).source
    return index if source is None else source(index)


def _shuffled(dataset: Dataset, seed: int, stream: str) -> tuple[list[int], list[int]]:
    """Indices of the samples that have a label, as far as the data set's `labels` tell, and of the others."""
    order = torch.randperm(len(dataset), generator=generator(seed, 0, 0, stream)).tolist()
    labels = DatasetTraits.of(dataset).labels
    if labels is None:
        return order, []
    unlabelled = np.asarray(labels) < 0
    return [i for i in order if not unlabelled[i]], [i for i in order if unlabelled[i]]


@dataclass(frozen=True, kw_only=True)
class LabelledSplit(Split):
    """Samples whose labels are known before they are read."""

    labels: Tensor
    """long [n], at least 0"""

    @cached_property
    def digest(self) -> str:
        """Hash of names and labels of the samples, not of the contents of files."""
        digest = hashlib.sha256(repr(self.labels.tolist()).encode())
        for index in self.indices:
            digest.update(f"{index} {self.dataset.describe(index)}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()[:16]

    @property
    def num_sources(self) -> int:
        """Independent test samples: clips of one video are not independent."""
        return len({_source(self.dataset, index) for index in self.indices})

    def take(self, rows: Tensor) -> LabelledSplit:
        return replace(self, indices=tuple(self.indices[row] for row in rows.tolist()), labels=self.labels[rows])


class LabelledSplits(NamedTuple):
    train: LabelledSplit
    test: LabelledSplit
    classes: tuple[str, ...]
    description: str
    """one sentence"""
    warnings: tuple[str, ...]


def labelled_splits(
    dataset: Dataset, *, train_samples: int | None, test_samples: int | None, seed: int, num_workers: int | None
) -> LabelledSplits:
    """Training samples are the data set's, test samples those of its held-out part, or held out here without one.

    Raises ConfigError where there are no labels to judge by.
    """
    dataset = DatasetTraits.of(dataset).probe_dataset or dataset
    drawn = probe_splits(
        dataset, train_samples=train_samples or len(dataset), val_samples=test_samples or sys.maxsize, seed=seed
    )
    workers = choose_num_workers(dataset) if num_workers is None else num_workers
    splits, unlabelled = [], 0
    for name, split in (("training", drawn.train), ("test", drawn.val)):
        labelled = _labelled(replace(split, name=name, indices=tuple(sorted(split.indices)), num_workers=workers))
        unlabelled += len(split.indices) - len(labelled.indices)
        if not labelled.indices:
            raise ConfigError([f"dataset: no {name} sample has a label, and all tasks of jepa-eval need them"])
        splits.append(labelled)
    train, test = splits
    if len(train.labels.unique()) < 2:
        raise ConfigError([f"dataset: all {len(train.labels)} labelled training samples are of one class"])
    own = dataset.validation() is not None
    limits = [f"{n:,} drawn at random (seed {seed})" for n in (train_samples, test_samples) if n] or ["all"]
    description = (
        f"{len(train.indices):,} training samples; {len(test.indices):,} test samples "
        + ("of the held-out part" if own else f"held out of the training set (seed {seed}), a quarter of it at most")
        + (f", limited: {'; '.join(limits)}" if train_samples or test_samples else "")
        + (f"; {unlabelled:,} without a label are left out" if unlabelled else "")
    )
    names = _names(dataset.classes, splits)
    return LabelledSplits(train, test, names, description, tuple(_warnings(names, train, test)))


def few_shot_rows(labels: Tensor, shots: float, seed: int, classes: Sequence[str]) -> Tensor:
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


def _labelled(split: Split) -> LabelledSplit:
    """The samples that have a label; where the data set does not list its labels, all are read for them."""
    listed = DatasetTraits.of(split.dataset).labels
    if listed is None:
        labels = torch.full((len(split.indices),), -1)
        for batch in Samples(split=split, reduce=_nothing, batch_size=256, title="reading labels").batches():
            labels[batch.rows] = batch.labels
    else:
        labels = torch.as_tensor(np.asarray(listed)[list(split.indices)])
    whole = LabelledSplit(**vars(split), labels=labels)
    return whole.take((labels >= 0).nonzero()[:, 0])


def _nothing(clips: Sequence[Tensor]) -> Tensor:
    return torch.empty(len(clips), 0)


def _names(classes: Sequence[str], splits: Sequence[LabelledSplit]) -> tuple[str, ...]:
    most = max(int(split.labels.max()) for split in splits) + 1
    return (*classes, *(str(label) for label in range(len(classes), most)))


def _warnings(names: tuple[str, ...], train: LabelledSplit, test: LabelledSplit) -> Iterator[str]:
    train_names, test_names = ({names[label] for label in split.labels.unique().tolist()} for split in (train, test))
    if missing := sorted(test_names - train_names):
        count = sum(int((test.labels == names.index(name)).sum()) for name in missing)
        yield f"no training sample of {_listed(missing)}: its {count:,} test samples count as wrong"
    if missing := sorted(train_names - test_names):
        yield f"no test sample of {_listed(missing)}: nothing is known of how well it is told"


def _listed(names: Sequence[str]) -> str:
    first = ", ".join(f'"{name}"' for name in names[:8])
    return f"class {first}" + (f" and {len(names) - 8} more" if len(names) > 8 else "")
