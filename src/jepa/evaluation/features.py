"""Frozen features of the probe's samples: the one place where evaluation reads images and runs the encoder.

The probe has samples of its own, drawn once for the run: images are decoded at the first evaluation and kept as uint8.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from jepa.distributed import generator
from jepa.layers.probes import pool_tokens
from jepa.types import Batch, Dataset, Evaluator, Features, Interrupted, Masker, PatchGrid, Snapshot
from jepa.types import MeasuredDataset as Measured

if TYPE_CHECKING:
    from jepa.data.transforms import EvalTransform

MAX_CACHE_BYTES = 1 << 30
"""of decoded pictures of one part; what is larger is read again at each evaluation"""
MAX_SHOWN_BYTES = 1 << 28
"""of pictures that are kept for the diagnosis whatever the size of the part"""
NUM_MASKS = 512
NUM_DIAGNOSED = 256
THUMBNAIL = 32
PIXELS_SIDE = 16
"""of the images of the raw-pixel baseline: on CIFAR-10 a stronger one than 32 pixels a side, at a tenth of the cost"""
SILENT_SECONDS = 5
"""an evaluation that takes longer shows a bar on a terminal"""

log = logging.getLogger(__name__)

Watch = Callable[[int], None]
"""told how many samples have just been encoded; raises Interrupted where the run is to stop"""


class ProbeBatch(NamedTuple):
    pictures: Tensor
    """uint8 [b, C, T, H, W]"""
    labels: Tensor
    """long [b]"""
    targets: Tensor
    """float32 [b, Q], Q = 0 where the data set measures nothing"""


class Look(NamedTuple):
    """What is noted of a part's samples, so that they need not be read again for it."""

    pictures: Tensor
    """uint8 [h, C, T, H, W] of the first ones"""
    thumbnails: Tensor
    """uint8 [n, C, 32, 32], of clips the middle frame"""
    pixels: Tensor
    """float32 [n, C * h * w]: mean over the frames, reduced to at most 16 pixels a side, values in [0, 1]"""


class ProbePart:
    """Some samples of a data set, in a fixed order; unreadable ones are left out."""

    def __init__(self, *, dataset: Dataset, indices: Sequence[int], max_cache_bytes: int = MAX_CACHE_BYTES) -> None:
        self.dataset = dataset
        self.indices = tuple(indices)
        self.max_cache_bytes = max_cache_bytes
        self.measured = dataset if isinstance(dataset, Measured) else None
        self.look: Look | None = None
        self._kept: list[ProbeBatch] | None = None
        self._told = False

    @property
    def seen(self) -> Look:
        """After the first pass."""
        assert self.look is not None
        return self.look

    def batches(self, transform: EvalTransform, batch_size: int) -> Iterator[ProbeBatch]:
        """At most `batch_size` samples each; always in the same order."""
        if self._kept is not None:
            for kept in self._kept:
                yield from map(ProbeBatch, *(part.split(batch_size) for part in kept))
            return
        kept, num_bytes, num_read = [], 0, 0
        for start in range(0, len(self.indices), batch_size):
            samples = [s for i in self.indices[start : start + batch_size] if (s := self._read(i)) is not None]
            if not samples:
                continue
            clips, labels, targets = zip(*samples, strict=True)
            batch = ProbeBatch(transform.pictures(clips), torch.tensor(labels), torch.stack(targets))
            num_read, num_bytes = num_read + len(samples), num_bytes + batch.pictures.nbytes
            if num_bytes <= self.max_cache_bytes:
                kept.append(batch)
            else:
                kept.clear()
            yield batch
        self._report_broken(num_read)
        self._kept = kept if num_bytes <= self.max_cache_bytes else None

    def _read(self, index: int) -> tuple[Tensor, int, Tensor] | None:
        try:
            measured = self.measured.measure(index) if self.measured else torch.zeros(0)
            return *self.dataset[index], measured
        except (OSError, RuntimeError) as error:
            if not self._told:
                log.warning("evaluation leaves out %s: %s", self.dataset.describe(index), error)
            return None

    def _report_broken(self, num_read: int) -> None:
        self._told = True
        if num_read == 0:
            raise RuntimeError(
                f"none of the {len(self.indices)} samples of the evaluation could be read, "
                f"the first is {self.dataset.describe(self.indices[0])}"
            )


class ProbeSplit(NamedTuple):
    train: ProbePart
    val: ProbePart
    protocol: str

    @property
    def quantities(self) -> tuple[str, ...]:
        """What both parts measure."""
        train, val = self.train.measured, self.val.measured
        return train.quantities if train and val and train.quantities == val.quantities else ()


def probe_split(dataset: Dataset, *, train_samples: int, val_samples: int, seed: int) -> ProbeSplit:
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
        val = ProbePart(dataset=held_out, indices=(labelled + unlabelled)[:val_samples])
        source = "of the validation set"
    else:
        num_val = min(val_samples, max(1, len(dataset) // 4))
        num_labelled = min(num_val, max(1, len(order) // 4) if order else 0)
        num_others = min(num_val - num_labelled, len(others))
        val = ProbePart(dataset=dataset, indices=order[:num_labelled] + others[:num_others])
        shown = {_source(dataset, index) for index in val.indices}
        order, others = ([i for i in part if _source(dataset, i) not in shown] for part in (order, others))
        if not order and not others:
            raise ValueError(
                f"the probe has no samples of its own: all are of the {len(shown)} sources of its validation part; "
                f"lower evaluation.val_samples={val_samples}, or give a held-out part"
            )
        source = "held out of the training set (the encoder sees these images, never their labels)"
    train = ProbePart(dataset=dataset, indices=(order + others)[:train_samples])
    protocol = (
        "features: the encoder's output tokens in eval mode, averaged over the sample, no augmentation; "
        f"probes are fitted on {len(train.indices):,} samples of the training set and scored on "
        f"{len(val.indices):,} samples {source}, both drawn at random once (seed {seed}); "
        f"raw pixels are reduced to at most {PIXELS_SIDE} a side"
    )
    return ProbeSplit(train, val, protocol)


def _source(dataset: Dataset, index: int) -> int:
    """What a sample is taken from: samples of one source are no test of each other."""
    source = getattr(dataset, "source", None)
    return index if source is None else source(index)


def _shuffled(dataset: Dataset, seed: int, stream: str) -> tuple[list[int], list[int]]:
    """Indices of the samples that have a label, as far as the data set's `labels` tell, and of the others."""
    order = torch.randperm(len(dataset), generator=generator(seed, 0, 0, stream)).tolist()
    labels = getattr(dataset, "labels", None)
    if labels is None:
        return order, []
    unlabelled = np.asarray(labels) < 0
    return [i for i in order if not unlabelled[i]], [i for i in order if unlabelled[i]]


class Encoded(NamedTuple):
    features: Features
    still: Features | None
    tokens: Tensor
    """float32 [P, N, D] of the first samples"""


class Prober:
    """Takes snapshots of an objective's backbone on the same samples and masks each time.

    `protocol` says in one sentence where the features come from. Evaluation changes neither the modes of the modules
    nor the global random state. `still` also encodes each clip with its middle frame all the time; `evaluators` are
    asked here only whether they need tokens (`needs_tokens`: of a sample, at most).
    """

    def __init__(
        self, *, dataset: Dataset, transform: EvalTransform, masker: Masker, device: torch.device | str,
        batch_size: int, train_samples: int, val_samples: int, seed: int, still: bool = True,
        evaluators: Sequence[Evaluator] = (), autocast: Callable[[], AbstractContextManager] = nullcontext,
        num_pictures: int = 8,
    ) -> None:  # fmt: skip
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: must be at least 1")
        self.split = probe_split(dataset, train_samples=train_samples, val_samples=val_samples, seed=seed)
        self.num_frames = getattr(dataset, "num_frames", 1)
        self.still = still and self.num_frames > 1
        self.protocol = self.split.protocol
        if self.num_frames > 1:
            self.protocol += " and averaged over the frames: they hold where things were, not in which order"
        if self.still:
            self.protocol += "; still/* are the same probes on clips whose middle frame stands still"
        self.classes = dataset.classes
        self.transform = transform
        self.masks = masker(NUM_MASKS, generator(seed, 0, 0, "evaluation"))
        self.device = torch.device(device)
        self.batch_size = max(1, batch_size // self.num_frames)
        self.autocast = autocast
        self.num_pictures = num_pictures
        self.max_tokens = max((getattr(evaluator, "needs_tokens", 0) for evaluator in evaluators), default=0)

    @property
    def num_samples(self) -> int:
        """How many samples each evaluation encodes."""
        return (len(self.split.train.indices) + len(self.split.val.indices)) * (1 + self.still)

    def snapshot(self, step: int, objective: Any, should_stop: Callable[[], bool] = lambda: False) -> Snapshot:
        """What the evaluators look at, of an objective on this prober's device.

        `should_stop` is asked between batches; where it says so, Interrupted is raised.
        """
        backbone = objective.backbone
        with evaluating(objective), torch.no_grad(), self.autocast(), self._watch(should_stop) as watch:
            train = self._encode(backbone, self.split.train, watch)
            val = self._encode(backbone, self.split.val, watch)
            look = self.split.val.seen
            diagnosis = self._diagnose(objective, look.pictures, val.features.labels, watch)
        return Snapshot(
            step=step, train=train.features, val=val.features, classes=self.classes, grid=backbone.grid,
            pictures=look.pictures[: self.num_pictures], tokens=val.tokens, thumbnails=look.thumbnails,
            masks=self.masks, diagnosis=diagnosis, quantities=self.split.quantities,
            still=(train.still, val.still) if train.still and val.still else None,
        )  # fmt: skip

    def baselines(self, snapshot: Snapshot, evaluators: Sequence[Evaluator]) -> dict[str, float]:
        """The same probes on raw pixels instead of features, as baseline/pixels_*: what an encoder has to beat."""
        train, val = (
            features._replace(vectors=part.seen.pixels, tokens=None)
            for features, part in ((snapshot.train, self.split.train), (snapshot.val, self.split.val))
        )
        pixels = replace(
            snapshot, train=train, val=val, still=None, pictures=snapshot.pictures[:0], tokens=snapshot.tokens[:0]
        )
        metrics = {name: value for evaluator in evaluators for name, value in evaluator(pixels).metrics.items()}
        named = {name: name.removeprefix("probe/") for name in metrics if name.startswith("probe/")}
        named |= {"collapse/rank": "rank"} if "collapse/rank" in metrics else {}
        return {f"baseline/pixels_{short}": metrics[name] for name, short in named.items()}

    def _encode(self, backbone: Any, part: ProbePart, watch: Watch) -> Encoded:
        """Features of all samples and the tokens of the first; what the pictures show is noted in the first pass."""
        features, still, tokens, looks = [], [], [], []
        num_seen = 0
        for batch in part.batches(self.transform, self.batch_size):
            output = self._tokens(backbone, batch.pictures)
            features.append(self._features(output, batch, backbone.grid))
            tokens.append(output[: max(0, self.num_pictures - num_seen)].cpu())
            if self.still:
                middle = batch.pictures[:, :, self.num_frames // 2, None].expand_as(batch.pictures)
                still.append(self._features(self._tokens(backbone, middle), batch, backbone.grid))
            if part.look is None:
                looks.append(look_at(batch.pictures, num_seen, self.num_pictures))
            num_seen += len(batch.labels)
            watch(len(batch.labels) * (1 + self.still))
        part.look = part.look or Look(*map(torch.cat, zip(*looks, strict=True)))
        return Encoded(_join(features), _join(still) if still else None, torch.cat(tokens))

    def _tokens(self, backbone: nn.Module, pictures: Tensor) -> Tensor:
        """uint8 [b, C, T, H, W] -> float32 [b, N, D]"""
        return backbone(self.transform(pictures.to(self.device))).float()

    def _features(self, tokens: Tensor, batch: ProbeBatch, grid: PatchGrid) -> Features:
        kept = pool_tokens(tokens, grid, self.max_tokens).half().cpu() if self.max_tokens else None
        return Features(tokens.mean(1).cpu(), batch.labels, batch.targets, kept)

    def _diagnose(self, objective: Any, pictures: Tensor, labels: Tensor, watch: Watch) -> dict[str, float]:
        """Mean over samples of what the objective says of batches of them."""
        sums: dict[str, float] = {}
        count = min(len(pictures), NUM_DIAGNOSED)
        for start in range(0, count, self.batch_size):
            part = slice(start, min(start + self.batch_size, count))
            batch = Batch(self.transform(pictures[part].to(self.device)), labels[part].to(self.device))
            masks = self.masks.map(lambda indices, part=part: indices[part].to(self.device))
            for name, value in objective.diagnose(batch, masks).items():
                sums[name] = sums.get(name, 0.0) + float(value) * len(batch.labels) / count
            watch(0)
        return sums

    @contextmanager
    def _watch(self, should_stop: Callable[[], bool]) -> Iterator[Watch]:
        """On a terminal, a bar once it takes long."""
        with tqdm(
            total=self.num_samples, desc="evaluating", unit="sample", delay=SILENT_SECONDS, leave=False, disable=None
        ) as bar:

            def watch(num_encoded: int) -> None:
                bar.update(num_encoded)
                if should_stop():
                    raise Interrupted("the evaluation was asked to stop")

            yield watch


def look_at(pictures: Tensor, num_seen: int, num_pictures: int) -> Look:
    """uint8 [b, C, T, H, W], after `num_seen` others: of the first samples pictures are kept, as far as memory goes."""
    room = max(num_pictures, min(NUM_DIAGNOSED, MAX_SHOWN_BYTES // pictures[0].nbytes)) - num_seen
    height, width = pictures.shape[-2:]
    share = min(1.0, PIXELS_SIDE / max(height, width))
    size = (max(1, round(height * share)), max(1, round(width * share)))
    mean = pictures.sum(2, dtype=torch.float32) / pictures.shape[2]  # [b, C, H, W]
    return Look(
        pictures=pictures[: max(0, room)].clone(),
        thumbnails=F.adaptive_avg_pool2d(pictures[:, :, pictures.shape[2] // 2].float(), THUMBNAIL).round().byte(),
        pixels=F.adaptive_avg_pool2d(mean / 255, size).flatten(1),
    )


def _join(parts: Sequence[Features]) -> Features:
    vectors, labels, targets, tokens = (
        None if columns[0] is None else torch.cat(columns) for columns in zip(*parts, strict=True)
    )
    assert vectors is not None
    assert labels is not None
    return Features(vectors, labels, targets, tokens)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards each submodule is back in the mode it had."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
