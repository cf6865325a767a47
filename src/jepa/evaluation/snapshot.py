"""Snapshots of an objective during training: frozen features of the same samples each time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from jepa.evaluation.frozen import EncodedChunk, FrozenEncoder, Tuning, eval_mode
from jepa.evaluation.probe import constant_scores
from jepa.evaluation.samples import SampleBatch, Samples, progress, raw_batch, raw_pixels, thumbnails
from jepa.evaluation.splits import probe_splits
from jepa.evaluation.types import Evaluator, EvaluatorTraits, Features, Snapshot
from jepa.parallel.session import Session
from jepa.seeding import generator
from jepa.types import Batch, Dataset, DatasetTraits, Masker, Masks

if TYPE_CHECKING:
    from jepa.data.transforms import Augment, EvalTransform

NUM_MASKS = 512
"""Number of samples whose masks are drawn."""
MAX_CACHED_BYTES = 1 << 30
"""Decoded pictures of a split up to this size are cached; larger splits are read again at each evaluation."""
MAX_DIAGNOSED_BYTES = 1 << 28
"""Limit in bytes of the pictures kept for the diagnosis."""
NUM_DIAGNOSED = 256
"""Largest number of validation samples that the objective diagnoses."""
Advance = Callable[[int], object]
"""Called with the number of samples just encoded."""


class FirstPass(NamedTuple):
    """Data kept of a split when its samples are first read."""

    pictures: Tensor
    """uint8 [h, C, T, H, W] of the first samples"""
    thumbnails: Tensor
    """uint8 [n, C, 32, 32], the middle frame"""
    pixels: Tensor
    """float32 [n, C * h * w], see `raw_pixels`"""
    fields: dict[str, Tensor]
    """of the samples in `pictures`: the fields that the objective reads"""


class EncodedSplit(NamedTuple):
    """The encoded samples of a batch or split."""

    features: Features
    still: Features | None
    tokens: Tensor
    """float32 [P, N, D] of the first samples"""
    logits: Tensor | None
    first_pass: FirstPass | None


class Snapshotter:
    """Takes snapshots of an objective's backbone on the same samples and masks each time.

    `protocol` describes the features in a sentence. Evaluation changes neither the modes of the modules nor the global
    random state. With `still`, each clip is also encoded with its middle frame repeated. `evaluators` determine only
    the tokens (`needs_tokens`) and random crops (`num_views`, `num_viewed`, `view_scale`) of a snapshot. `crops` makes
    the augmentation of the run, without colours, with the arguments of the call. `fields` are those that the objective
    reads when it is diagnosed.
    """

    def __init__(
        self, *, dataset: Dataset, transform: EvalTransform, masker: Masker, session: Session, batch_size: int,
        train_samples: int, val_samples: int, seed: int, still: bool = True, evaluators: Sequence[Evaluator] = (),
        crops: Callable[..., Augment] | None = None, num_pictures: int = 8, fields: Collection[str] = (),
    ) -> None:  # fmt: skip
        self.splits = probe_splits(dataset, train_samples=train_samples, val_samples=val_samples, seed=seed)
        self.transform = transform
        self.train, self.val = (
            Samples(
                split=split, reduce=transform.pictures, batch_size=batch_size, max_bytes=MAX_CACHED_BYTES,
                fields=sorted({"quantities", *fields} & {*DatasetTraits.of(split.dataset).fields}),
            )
            for split in self.splits[:2]
        )  # fmt: skip
        self.num_frames = DatasetTraits.of(dataset).num_frames
        self.still = still and self.num_frames > 1
        self.protocol = self.splits.protocol
        if self.num_frames > 1:
            self.protocol += " and averaged over the frames: they show where things were, not in which order"
        if self.still:
            self.protocol += "; still/* are the same probes on clips that repeat their middle frame"
        self.classes = dataset.classes
        self.masks = masker(NUM_MASKS, generator(seed, 0, 0, "evaluation"))
        self.session = session
        self.batch_size = self.train.batch_size
        self.num_pictures = num_pictures
        self.max_tokens = max((EvaluatorTraits.of(evaluator).needs_tokens for evaluator in evaluators), default=0)
        readouts = (EvaluatorTraits.of(evaluator).readout for evaluator in evaluators)
        self.readouts = sorted({*readouts} - {"mean"})
        self.has_evaluators = bool(evaluators)
        multi_view = (evaluator for evaluator in evaluators if crops and EvaluatorTraits.of(evaluator).num_views)
        self.multi_view: Any = next(multi_view, None)
        num_train, num_val = (len(split.indices) for split in self.splits[:2])
        num_crops = min(num_val, self.multi_view.num_viewed) * self.multi_view.num_views if self.multi_view else 0
        self.num_samples = (num_train + num_val) * (1 + self.still) + num_crops
        """Number of samples that each evaluation encodes."""
        self.crops = crops
        self.fields = fields
        self.seed = seed
        self._first_passes: dict[str, FirstPass] = {}

    def snapshot(self, step: int, objective: Any) -> Snapshot:
        """The input of the evaluators, of an objective on the session's device."""
        backbone, head = objective.backbone, objective.classify
        encoder = FrozenEncoder(encoder=backbone, transform=self.transform, session=self.session, further=self.readouts)
        bar = progress(self.num_samples, "evaluating")
        with eval_mode(objective), torch.no_grad(), bar as advance:
            train = self._encode(encoder, self.train, advance)
            val = self._encode(encoder, self.val, advance, head)
            labels, first_pass = val.features.labels, self._first_passes[self.val.split.name]
            pictures = first_pass.pictures[: self.num_pictures]
            with self.session.autocast():
                diagnosis = self._diagnose(objective, encoder, first_pass, labels, advance)
                reconstructions = self._reconstructions(objective, encoder, first_pass, labels)
                views = self._views(backbone, first_pass.pictures, advance) if self.multi_view else None
        tuning = Tuning(encoder, self.train, self.val, self.crops(), self.seed) if self.crops else None
        return Snapshot(
            step=step, train=train.features, val=val.features, classes=self.classes, grid=backbone.grid,
            pictures=pictures, tokens=val.tokens, thumbnails=first_pass.thumbnails,
            masks=self.masks, diagnosis=diagnosis, quantities=self.splits.quantities,
            reconstructions=reconstructions, still=(train.still, val.still) if train.still and val.still else None,
            views=views, tuning=tuning, logits=val.logits,
        )  # fmt: skip

    def baselines(self, snapshot: Snapshot, evaluators: Sequence[Evaluator]) -> dict[str, float]:
        """Metrics of the same probes on raw pixels, as baseline/pixels_*, and of the largest class, as constant_*."""
        train, val = (
            features._replace(vectors=self._first_passes[split.name].pixels, tokens=None, readouts={})
            for features, split in zip((snapshot.train, snapshot.val), self.splits[:2], strict=True)
        )
        pixels = replace(
            snapshot, train=train, val=val, still=None, pictures=snapshot.pictures[:0], tokens=snapshot.tokens[:0],
            reconstructions={}, views=None, tuning=None, logits=None,
        )  # fmt: skip
        metrics = {name: value for evaluator in evaluators for name, value in evaluator(pixels).metrics.items()}
        constant = constant_scores(snapshot.train, snapshot.val)
        return {f"baseline/{name}": value for name, value in constant.items()} | {
            f"baseline/pixels_{name.partition('/')[2]}": value
            for name, value in metrics.items() if name.startswith("probe/") or name == "collapse/rank"
        }  # fmt: skip

    def _encode(
        self, encoder: FrozenEncoder, samples: Samples, advance: Advance, head: Callable[[Tensor], Tensor] | None = None
    ) -> EncodedSplit:
        """Features of all samples and tokens of the first; keeps pictures, thumbnails and pixels of the first pass."""
        batches, num_read = [], 0
        is_first_pass = samples.split.name not in self._first_passes
        with self.session.autocast():
            for batch in samples.batches():
                encoded = encoder.encode(batch.values, self.max_tokens)
                assert encoded.last is not None
                still = None
                if self.still:
                    middle = batch.values[:, :, self.num_frames // 2, None].expand_as(batch.values)
                    still = _features(encoder.encode(middle, self.max_tokens), batch)
                tokens = encoded.last[: max(0, self.num_pictures - num_read)].cpu()
                logits = head(encoded.last).float().cpu() if head else None
                first_pass = self._first_pass(batch, num_read) if is_first_pass else None
                batches.append(EncodedSplit(_features(encoded, batch), still, tokens, logits, first_pass))
                num_read += len(batch.rows)
                advance(len(batch.rows) * (1 + self.still))
        encoded_split = _join(batches)
        if is_first_pass:
            self._first_passes[samples.split.name] = encoded_split.first_pass
        return encoded_split

    def _diagnose(
        self, objective: Any, encoder: FrozenEncoder, first_pass: FirstPass, labels: Tensor, advance: Advance
    ) -> dict[str, float]:
        """Mean over samples of the diagnosis of the objective."""
        sums: dict[str, float] = {}
        count = min(len(first_pass.pictures), NUM_DIAGNOSED)
        for rows in torch.arange(count).split(self.batch_size):
            batch, masks = self._batch(encoder, first_pass, labels, rows)
            for name, value in objective.diagnose(batch, masks).items():
                sums[name] = sums.get(name, 0.0) + float(value) * len(rows) / count
            advance(0)
        return sums

    def _reconstructions(
        self, objective: Any, encoder: FrozenEncoder, first_pass: FirstPass, labels: Tensor
    ) -> dict[str, Tensor]:
        """The reconstructions of the first samples by the objective, as uint8."""
        rows = torch.arange(min(self.num_pictures, len(first_pass.pictures)))
        batch, masks = self._batch(encoder, first_pass, labels, rows)
        clips = objective.pictures(batch, masks)
        return {name: self.transform.normalise.undo(values.float().cpu()) for name, values in clips.items()}

    def _batch(
        self, encoder: FrozenEncoder, first_pass: FirstPass, labels: Tensor, rows: Tensor
    ) -> tuple[Batch, Masks]:
        device = self.session.device
        masks = self.masks.map(lambda indices: indices[rows].to(device))
        fields = {name: values[rows].to(device) for name, values in {"labels": labels, **first_pass.fields}.items()}
        return Batch(encoder.clips(first_pass.pictures[rows]), fields), masks

    def _first_pass(self, batch: SampleBatch, num_before: int) -> FirstPass:
        """Of the batch after `num_before` samples: keeps only the first pictures of a split."""
        pictures = batch.values
        most = max(self.num_pictures, min(NUM_DIAGNOSED, MAX_DIAGNOSED_BYTES // pictures[0].nbytes))
        count = max(0, most - num_before)
        fields = {name: torch.stack(batch.fields[name])[:count] for name in self.fields}
        return FirstPass(pictures[:count].clone(), thumbnails(pictures), raw_pixels(pictures), fields)

    def _views(self, backbone: Any, pictures: Tensor, advance: Advance) -> Tensor:
        """uint8 [h, C, T, H, W] -> float32 [n, q, D]: random crops of the first n, the same at each evaluation"""
        assert self.crops is not None
        augment = self.crops(crop_scale=self.multi_view.view_scale, views=self.multi_view.num_views)
        rng, vectors = generator(self.seed, 0, 0, "views"), []
        size = max(1, self.batch_size // augment.views)
        for chunk in pictures[: self.multi_view.num_viewed].split(size):
            clips = augment(raw_batch(chunk, self.session.device), rng).clips
            vectors.append(backbone(clips).float().mean(1).cpu())
            advance(len(clips))
        return torch.cat(vectors).unflatten(0, (-1, augment.views))


def _features(encoded: EncodedChunk, batch: SampleBatch) -> Features:
    quantities = batch.fields.get("quantities")
    targets = torch.zeros(len(batch.labels), 0) if quantities is None else torch.stack(quantities)
    return Features(encoded.vectors, batch.labels, targets, encoded.tokens, encoded.readouts)


def _join(parts: list[Any] | tuple[Any, ...]) -> Any:
    """Joins tensors, or tuples or dicts of tensors, along the samples; None stays None."""
    if isinstance(parts[0], dict):
        return {name: _join([part[name] for part in parts]) for name in parts[0]}
    if parts[0] is None or isinstance(parts[0], Tensor):
        return None if parts[0] is None else torch.cat(parts)
    return parts[0]._make(map(_join, zip(*parts, strict=True)))
