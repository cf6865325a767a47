"""Training and validation samples of the probes during training, and labelled splits for jepa-eval."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from jepa.data.identity import digest_of_files, digest_of_samples
from jepa.data.loader import choose_num_workers
from jepa.errors import ConfigError
from jepa.evaluation.samples import PIXELS_SIDE, Samples, Split
from jepa.seeding import generator
from jepa.types import Dataset, DatasetTraits, Field

NUM_THREADS = 16
"""Number of threads that ask for the times of files, which a file server answers one by one."""


class ProbeSplits(NamedTuple):
    train: Split
    val: Split
    protocol: str

    @property
    def quantities(self) -> tuple[str, ...]:
        """Names of the quantities, if both parts have the same."""
        train, val = (DatasetTraits.of(part.dataset).fields.get("quantities", Field()).names for part in self[:2])
        return train if train == val else ()


def probe_splits(dataset: Dataset, *, train_samples: int, val_samples: int, seed: int) -> ProbeSplits:
    """Training and validation samples of probes, drawn uniformly, labelled samples first; pure in the arguments.

    Without `dataset.validation()`, validation samples are held out of the training set, and training samples have other
    sources (`dataset.source(index)`, e.g. the video) than these.
    """
    if min(train_samples, val_samples) < 1:
        raise ValueError(f"train_samples={train_samples}, val_samples={val_samples}: each must be at least 1")
    if len(dataset) < 2:
        raise ValueError(f"a probe needs at least 2 training samples, the data set has {len(dataset)}")
    labelled, unlabelled = _shuffled(dataset, seed, "probe")
    held_out = dataset.validation()
    if held_out is not None:
        val_indices = [*chain(*_shuffled(held_out, seed, "validation"))][:val_samples]
        origin = "of the validation set"
    else:
        num_val = min(val_samples, max(1, len(dataset) // 4))
        num_labelled = min(num_val, max(1, len(labelled) // 4) if labelled else 0)
        val_indices = labelled[:num_labelled] + unlabelled[: num_val - num_labelled]
        source = DatasetTraits.of(dataset).source
        val_sources = set(map(source, val_indices))
        labelled, unlabelled = ([i for i in part if source(i) not in val_sources] for part in (labelled, unlabelled))
        if not labelled and not unlabelled:
            raise ValueError(
                f"no training samples are left for the probe: all come from the {len(val_sources)} sources of its "
                f"validation part; lower evaluation.val_samples={val_samples}, or give a held-out part"
            )
        origin = "held out of the training set (the encoder sees these images, never their labels)"
    train = Split(dataset=dataset, name="training", indices=tuple((labelled + unlabelled)[:train_samples]))
    val = Split(dataset=dataset if held_out is None else held_out, name="validation", indices=tuple(val_indices))
    protocol = (
        "features: the encoder's output tokens in eval mode, averaged over the sample, no augmentation; "
        f"probes are fitted on {len(train.indices):,} samples of the training set and scored on "
        f"{len(val.indices):,} samples {origin}, both drawn at random once (seed {seed}); "
        f"raw pixels are reduced to at most {PIXELS_SIDE} a side"
    )
    return ProbeSplits(train, val, protocol)


def _shuffled(dataset: Dataset, seed: int, stream: str) -> tuple[list[int], list[int]]:
    """Shuffled indices of labelled and of unlabelled samples; without `dataset.labels`, all count as labelled."""
    order = torch.randperm(len(dataset), generator=generator(seed, 0, 0, stream)).tolist()
    labels = DatasetTraits.of(dataset).labels
    if labels is None:
        return order, []
    is_labelled = np.asarray(labels) >= 0
    return [i for i in order if is_labelled[i]], [i for i in order if not is_labelled[i]]


@dataclass(frozen=True, kw_only=True)
class LabelledSplit(Split):
    """Labelled samples, whose labels are known before they are read."""

    labels: Tensor
    """long [n], at least 0"""

    @cached_property
    def digest(self) -> str:
        """Hash of the labels of the samples and of the contents of some, the same wherever the data lie."""
        content = digest_of_samples(self.dataset, self.indices)
        return hashlib.sha256(repr([content, self.indices, self.labels.tolist()]).encode()).hexdigest()[:16]

    @cached_property
    def files(self) -> str | None:
        """Hash of the sizes of the files and of the contents of more of them, None without files."""
        return digest_of_files(self.dataset, self.indices)

    @cached_property
    def version(self) -> str:
        """Hash that also changes when the file of any sample is written again, for what is computed from the files."""
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            times = list(pool.map(DatasetTraits.of(self.dataset).modified, self.indices))
        white = [value for value in [getattr(self.dataset, "max_value", None)] if value]  # changes pixels, not files
        return hashlib.sha256(repr([self.digest, times, *white]).encode()).hexdigest()[:16]

    @property
    def num_sources(self) -> int:
        """Number of independent samples: clips of one video are not independent."""
        return len(set(map(DatasetTraits.of(self.dataset).source, self.indices)))

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
    """Test samples are those of the held-out part, or held out of the training samples if there is none.

    Raises ConfigError if there are no labels to evaluate with.
    """
    dataset = DatasetTraits.of(dataset).probe_dataset or dataset
    splits = probe_splits(
        dataset, train_samples=train_samples or len(dataset), val_samples=test_samples or sys.maxsize, seed=seed
    )
    workers = choose_num_workers(dataset) if num_workers is None else num_workers
    train, test = (
        _labelled(replace(split, name=name, indices=tuple(sorted(split.indices)), num_workers=workers))
        for name, split in (("training", splits.train), ("test", splits.val))
    )
    if len(train.labels.unique()) < 2:
        raise ConfigError([f"dataset: all {len(train.labels)} labelled training samples are of one class"])
    unlabelled = len(splits.train.indices) + len(splits.val.indices) - len(train.indices) - len(test.indices)
    origin = f"held out of the training set (seed {seed}), a quarter of it at most"
    limits = [f"{n:,} drawn at random (seed {seed})" for n in (train_samples, test_samples) if n]
    description = (
        f"{len(train.indices):,} training samples; {len(test.indices):,} test samples "
        + (origin if dataset.validation() is None else "of the held-out part")
        + (f", limited: {'; '.join(limits)}" if limits else "")
        + (f"; {unlabelled:,} without a label are left out" if unlabelled else "")
    )
    num_classes = int(torch.cat([train.labels, test.labels]).max()) + 1
    names = (*dataset.classes, *map(str, range(len(dataset.classes), num_classes)))
    return LabelledSplits(train, test, names, description, tuple(_warnings(names, train, test)))


def few_shot_rows(labels: Tensor, shots: float, seed: int, classes: Sequence[str]) -> Tensor:
    """[n] -> sorted rows: `shots` samples of each class, or below 1 that share of them (at least one).

    With one seed, a smaller split is a subset of every larger one. Raises ConfigError if a class has too few samples.
    """
    rank = torch.rand(len(labels), generator=generator(seed, 0, 0, "shots"))
    rows_of_classes = []
    for label in labels.unique().tolist():
        rows = (labels == label).nonzero()[:, 0]
        count = int(shots) if shots >= 1 else max(1, round(shots * len(rows)))
        if count > len(rows):
            message = f'shots={shots:g}: class "{classes[label]}" has only {len(rows)} training samples; lower shots'
            raise ConfigError([message])
        rows_of_classes.append(rows[rank[rows].argsort()[:count]])
    return torch.cat(rows_of_classes).sort().values


def _labelled(split: Split) -> LabelledSplit:
    """The labelled samples; reads all samples if the data set does not list its labels."""
    labels = DatasetTraits.of(split.dataset).labels
    if labels is None:
        labels = torch.full((len(split.indices),), -1)
        for batch in Samples(split=split, reduce=_no_values, batch_size=256, title="reading labels").batches():
            labels[batch.rows] = batch.labels
    else:
        labels = torch.as_tensor(np.asarray(labels)[list(split.indices)])
    if (labels < 0).all():
        raise ConfigError([f"dataset: no {split.name} sample has a label, and all tasks of jepa-eval need them"])
    return LabelledSplit(**vars(split), labels=labels).take((labels >= 0).nonzero()[:, 0])


def _no_values(clips: Sequence[Tensor]) -> Tensor:
    return torch.empty(len(clips), 0)


def _warnings(names: tuple[str, ...], train: LabelledSplit, test: LabelledSplit) -> Iterator[str]:
    train_names, test_names = ({names[label] for label in split.labels.unique().tolist()} for split in (train, test))
    if missing := sorted(test_names - train_names):
        count = sum(int((test.labels == names.index(name)).sum()) for name in missing)
        yield f"no training sample of {_listed(missing)}: its {count:,} test samples count as wrong"
    if missing := sorted(train_names - test_names):
        yield f"no test sample of {_listed(missing)}: the accuracy on it is unknown"


def _listed(names: Sequence[str]) -> str:
    first = ", ".join(f'"{name}"' for name in names[:8])
    return f"class {first}" + (f" and {len(names) - 8} more" if len(names) > 8 else "")
