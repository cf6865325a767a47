"""Frozen features of the probe's samples: the one place where evaluation reads images and runs the encoder.

The probe has samples of its own, drawn once for the run: images are decoded at the first evaluation and kept as uint8.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jepa.distributed import generator
from jepa.types import Batch, Dataset, Evaluator, Features, Masker, Masks, Snapshot

if TYPE_CHECKING:
    from jepa.data.transforms import EvalTransform

MAX_CACHE_BYTES = 1 << 30
"""of decoded pictures of one part; what is larger is read again at each evaluation"""
NUM_MASKS = 512
NUM_DIAGNOSED = 256
THUMBNAIL = 32
PIXELS_SIDE = 16
"""of the images of the raw-pixel baseline: on CIFAR-10 a stronger one than 32 pixels a side, at a tenth of the cost"""
PIXEL_NAMES = {
    "probe/knn_top1": "baseline/pixels_knn_top1",
    "probe/linear_top1": "baseline/pixels_linear_top1",
    "collapse/rank": "baseline/pixels_rank",
}

log = logging.getLogger(__name__)


class ProbePart:
    """Some samples of a data set, in a fixed order; unreadable ones are left out."""

    def __init__(self, *, dataset: Dataset, indices: Sequence[int], max_cache_bytes: int = MAX_CACHE_BYTES) -> None:
        self.dataset = dataset
        self.indices = tuple(indices)
        self.max_cache_bytes = max_cache_bytes
        self._kept: list[tuple[Tensor, Tensor]] | None = None
        self._told = False

    def batches(self, transform: EvalTransform, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs of pictures uint8 [b, C, T, H, W] and labels [b], b <= batch_size; always in the same order."""
        if self._kept is not None:
            for pictures, labels in self._kept:
                yield from zip(pictures.split(batch_size), labels.split(batch_size), strict=True)
            return
        kept, num_bytes, num_read = [], 0, 0
        for start in range(0, len(self.indices), batch_size):
            samples = [s for i in self.indices[start : start + batch_size] if (s := self._read(i)) is not None]
            if not samples:
                continue
            pictures = transform.pictures([clip for clip, _ in samples])
            labels = torch.tensor([label for _, label in samples])
            num_read, num_bytes = num_read + len(samples), num_bytes + pictures.nbytes
            if num_bytes <= self.max_cache_bytes:
                kept.append((pictures, labels))
            yield pictures, labels
        self._report_broken(num_read)
        self._kept = kept if num_bytes <= self.max_cache_bytes else None

    def _read(self, index: int) -> tuple[Tensor, int] | None:
        try:
            return self.dataset[index]
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


def probe_split(dataset: Dataset, *, train_samples: int, val_samples: int, seed: int) -> ProbeSplit:
    """The probe's two parts, drawn uniformly without replacement: a pure function of its arguments.

    The validation part comes from `dataset.validation()`, or where there is none from samples of the training set that
    the probe is not fitted on.
    """
    if min(train_samples, val_samples) < 1:
        raise ValueError(f"train_samples={train_samples}, val_samples={val_samples}: each must be at least 1")
    if len(dataset) < 2:
        raise ValueError(f"a probe needs at least 2 training samples, the data set has {len(dataset)}")
    order = _shuffled(len(dataset), seed, "probe")
    held_out = dataset.validation()
    if held_out is not None:
        val = ProbePart(dataset=held_out, indices=_shuffled(len(held_out), seed, "validation")[:val_samples])
        source = "of the validation set"
    else:
        num_val = min(val_samples, max(1, len(dataset) // 4))
        order, val = order[num_val:], ProbePart(dataset=dataset, indices=order[:num_val])
        source = "held out of the training set (the encoder sees these images, never their labels)"
    train = ProbePart(dataset=dataset, indices=order[:train_samples])
    protocol = (
        "features: the encoder's output tokens in eval mode, averaged over the image, no augmentation; "
        f"probes are fitted on {len(train.indices):,} samples of the training set and scored on "
        f"{len(val.indices):,} samples {source}, both drawn at random once (seed {seed}); "
        f"raw pixels are reduced to at most {PIXELS_SIDE} a side"
    )
    return ProbeSplit(train, val, protocol)


def _shuffled(count: int, seed: int, stream: str) -> list[int]:
    return torch.randperm(count, generator=generator(seed, 0, 0, stream)).tolist()


class Prober:
    """Takes snapshots of an objective's backbone on the same samples and masks each time.

    `protocol` says in one sentence where the features come from. Evaluation changes neither the modes of the modules
    nor the global random state.
    """

    def __init__(
        self, *, dataset: Dataset, transform: EvalTransform, masker: Masker, device: torch.device | str,
        batch_size: int, train_samples: int, val_samples: int, seed: int,
        autocast: Callable[[], AbstractContextManager] = nullcontext, num_pictures: int = 8,
    ) -> None:  # fmt: skip
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: must be at least 1")
        self.split = probe_split(dataset, train_samples=train_samples, val_samples=val_samples, seed=seed)
        self.protocol = self.split.protocol
        self.classes = dataset.classes
        self.transform = transform
        self.masks = masker(NUM_MASKS, generator(seed, 0, 0, "evaluation"))
        self.device = torch.device(device)
        self.batch_size = batch_size
        self.autocast = autocast
        self.num_pictures = num_pictures
        self._seen: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def num_samples(self) -> int:
        """How many images each evaluation encodes."""
        return len(self.split.train.indices) + len(self.split.val.indices)

    def snapshot(self, step: int, objective: Any) -> Snapshot:
        """What the evaluators look at, of an objective on this prober's device."""
        pictures, labels, thumbnails = self._look()
        with evaluating(objective), torch.no_grad(), self.autocast():
            train, _ = self._encode(objective.backbone, self.split.train, num_kept=0)
            val, tokens = self._encode(objective.backbone, self.split.val, num_kept=self.num_pictures)
            diagnosis = self._diagnose(objective, pictures, labels)
        return Snapshot(
            step=step, train=train, val=val, classes=self.classes, grid=objective.backbone.grid,
            pictures=pictures[: self.num_pictures, :, 0], tokens=tokens, thumbnails=thumbnails,
            masks=self.masks, diagnosis=diagnosis,
        )  # fmt: skip

    def baselines(self, snapshot: Snapshot, evaluators: Sequence[Evaluator]) -> dict[str, float]:
        """The same probes on raw pixels instead of features, as baseline/pixels_*: what an encoder has to beat."""
        pixels = replace(
            snapshot, train=self._pixels(self.split.train), val=self._pixels(self.split.val),
            pictures=snapshot.pictures[:0], tokens=snapshot.tokens[:0],
        )  # fmt: skip
        metrics = {name: value for evaluator in evaluators for name, value in evaluator(pixels).metrics.items()}
        return {PIXEL_NAMES[name]: value for name, value in metrics.items() if name in PIXEL_NAMES}

    def _encode(self, backbone: nn.Module, part: ProbePart, num_kept: int) -> tuple[Features, Tensor]:
        """Pooled features [n, D] and the tokens [num_kept, N, D] of the first samples."""
        vectors, labels, tokens = [], [], []
        for pictures, some_labels in part.batches(self.transform, self.batch_size):
            output = backbone(self.transform(pictures.to(self.device))).float()  # [b, N, D]
            vectors.append(output.mean(1).cpu())
            labels.append(some_labels)
            tokens.append(output[:num_kept].cpu())
            num_kept -= len(tokens[-1])
        return Features(torch.cat(vectors), torch.cat(labels)), torch.cat(tokens)

    def _look(self) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures uint8 [h, C, T, H, W] and labels [h] of the first validation samples, thumbnails of all."""
        if self._seen is None:
            count = max(self.num_pictures, NUM_DIAGNOSED)
            pictures, labels, thumbnails = [], [], []
            for some, some_labels in self.split.val.batches(self.transform, self.batch_size):
                pictures.append(some[:count])
                labels.append(some_labels[:count])
                thumbnails.append(F.adaptive_avg_pool2d(some[:, :, 0].float(), THUMBNAIL).round().byte())
                count -= len(pictures[-1])
            self._seen = torch.cat(pictures), torch.cat(labels), torch.cat(thumbnails)
        return self._seen

    def _diagnose(self, objective: Any, pictures: Tensor, labels: Tensor) -> dict[str, float]:
        """Mean over samples of what the objective says of batches of them."""
        sums: dict[str, float] = {}
        count = min(len(pictures), NUM_DIAGNOSED)
        for start in range(0, count, self.batch_size):
            part = slice(start, min(start + self.batch_size, count))
            batch = Batch(self.transform(pictures[part].to(self.device)), labels[part].to(self.device))
            masks = Masks(*(indices[part].to(self.device) for indices in self.masks))
            for name, value in objective.diagnose(batch, masks).items():
                sums[name] = sums.get(name, 0.0) + float(value) * len(batch.labels) / count
        return sums

    def _pixels(self, part: ProbePart) -> Features:
        """[n, C * h * w]: mean over the frames, reduced to at most 16 pixels a side, values in [0, 1]"""
        vectors, labels = [], []
        for pictures, some_labels in part.batches(self.transform, self.batch_size):
            height, width = pictures.shape[-2:]
            share = min(1.0, PIXELS_SIDE / max(height, width))
            size = (max(1, round(height * share)), max(1, round(width * share)))
            vectors.append(F.adaptive_avg_pool2d(pictures.float().mean(2) / 255, size).flatten(1))
            labels.append(some_labels)
        return Features(torch.cat(vectors), torch.cat(labels))


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
