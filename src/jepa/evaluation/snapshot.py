"""Frozen features of the probe's samples: the one place where evaluation reads images and runs the encoder.

The probe has samples of its own, drawn once for the run: images are decoded at the first evaluation and kept as uint8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Generator, Tensor, nn
from tqdm import tqdm

from jepa.errors import Interrupted
from jepa.evaluation.probe import pool_tokens
from jepa.evaluation.samples import NUM_DIAGNOSED, Look, ProbeBatch, ProbePart, evaluating, look_at, probe_split
from jepa.evaluation.types import Evaluator, Features, Snapshot, Tuning
from jepa.seeding import generator
from jepa.types import Batch, Dataset, Masker, PatchGrid

if TYPE_CHECKING:
    from jepa.data.transforms import Augment, EvalTransform
from jepa.evaluation.samples import raw_batch

NUM_MASKS = 512
SILENT_SECONDS = 5
"""an evaluation that takes longer shows a bar on a terminal"""
Watch = Callable[[int], None]
"""told how many samples have just been encoded; raises Interrupted where the run is to stop"""


class Encoded(NamedTuple):
    features: Features
    still: Features | None
    tokens: Tensor
    """float32 [P, N, D] of the first samples"""
    answers: Tensor | None


class Prober:
    """Takes snapshots of an objective's backbone on the same samples and masks each time.

    `protocol` says in one sentence where the features come from. Evaluation changes neither the modes of the modules
    nor the global random state. `still` also encodes each clip with its middle frame all the time; `evaluators` are
    asked here only whether they need tokens (`needs_tokens`: of a sample, at most) or random crops (`num_views` of each
    of the first `num_viewed` validation samples, `view_scale`). `crops` makes the run's augmentation, without colours,
    with the arguments that it is given.
    """

    def __init__(
        self, *, dataset: Dataset, transform: EvalTransform, masker: Masker, device: torch.device | str,
        batch_size: int, train_samples: int, val_samples: int, seed: int, still: bool = True,
        evaluators: Sequence[Evaluator] = (), autocast: Callable[[], AbstractContextManager] = nullcontext,
        crops: Callable[..., Augment] | None = None, num_pictures: int = 8,
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
        self.is_asked = bool(evaluators)
        self.viewer: Any = next((one for one in evaluators if crops and getattr(one, "num_views", 0)), None)
        self.crops = crops
        self.seed = seed

    @property
    def num_samples(self) -> int:
        """How many samples each evaluation encodes."""
        num_val = len(self.split.val.indices)
        num_crops = min(num_val, self.viewer.num_viewed) * self.viewer.num_views if self.viewer else 0
        return (len(self.split.train.indices) + num_val) * (1 + self.still) + num_crops

    def snapshot(self, step: int, objective: Any, should_stop: Callable[[], bool] = lambda: False) -> Snapshot:
        """What the evaluators look at, of an objective on this prober's device.

        `should_stop` is asked between batches; where it says so, Interrupted is raised.
        """
        backbone, head = objective.backbone, getattr(objective, "classify", None)
        with evaluating(objective), torch.no_grad(), self.autocast(), self._watch(should_stop) as watch:
            train = self._encode(backbone, self.split.train, watch)
            val = self._encode(backbone, self.split.val, watch, head)
            look = self.split.val.seen
            diagnosis = self._diagnose(objective, look.pictures, val.features.labels, watch)
            shown = self._shown(objective, look.pictures[: self.num_pictures], val.features.labels)
            views = self._views(backbone, look.pictures, watch) if self.viewer else None
        return Snapshot(
            step=step, train=train.features, val=val.features, classes=self.classes, grid=backbone.grid,
            pictures=look.pictures[: self.num_pictures], tokens=val.tokens, thumbnails=look.thumbnails,
            masks=self.masks, diagnosis=diagnosis, quantities=self.split.quantities,
            shown=shown, still=(train.still, val.still) if train.still and val.still else None,
            views=views, tuning=self._tuning(backbone, should_stop) if self.crops else None, answers=val.answers,
        )  # fmt: skip

    def baselines(self, snapshot: Snapshot, evaluators: Sequence[Evaluator]) -> dict[str, float]:
        """The same probes on raw pixels instead of features, as baseline/pixels_*: what an encoder has to beat."""
        train, val = (
            features._replace(vectors=part.seen.pixels, tokens=None)
            for features, part in ((snapshot.train, self.split.train), (snapshot.val, self.split.val))
        )
        pixels = replace(
            snapshot, train=train, val=val, still=None, pictures=snapshot.pictures[:0], tokens=snapshot.tokens[:0],
            shown={}, views=None, tuning=None, answers=None,
        )  # fmt: skip
        metrics = {name: value for evaluator in evaluators for name, value in evaluator(pixels).metrics.items()}
        named = {name: name.removeprefix("probe/") for name in metrics if name.startswith("probe/")}
        named |= {"collapse/rank": "rank"} if "collapse/rank" in metrics else {}
        return {f"baseline/pixels_{short}": metrics[name] for name, short in named.items()}

    def _encode(
        self, backbone: Any, part: ProbePart, watch: Watch, head: Callable[[Tensor], Tensor] | None = None
    ) -> Encoded:
        """Features of all samples and the tokens of the first; what the pictures show is noted in the first pass."""
        features, still, tokens, looks, answers = [], [], [], [], []
        num_seen = 0
        for batch in part.batches(self.transform, self.batch_size):
            output = self._tokens(backbone, batch.pictures)
            features.append(self._features(output, batch, backbone.grid))
            answers += [] if head is None else [head(output).float().cpu()]
            tokens.append(output[: max(0, self.num_pictures - num_seen)].cpu())
            if self.still:
                middle = batch.pictures[:, :, self.num_frames // 2, None].expand_as(batch.pictures)
                still.append(self._features(self._tokens(backbone, middle), batch, backbone.grid))
            if part.look is None:
                looks.append(look_at(batch.pictures, num_seen, self.num_pictures))
            num_seen += len(batch.labels)
            watch(len(batch.labels) * (1 + self.still))
        part.look = part.look or Look(*map(torch.cat, zip(*looks, strict=True)))
        told = torch.cat(answers) if answers else None
        return Encoded(_join(features), _join(still) if still else None, torch.cat(tokens), told)

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
            batch = self._batch(pictures[part], labels[part])
            masks = self.masks.map(lambda indices, part=part: indices[part].to(self.device))
            for name, value in objective.diagnose(batch, masks).items():
                sums[name] = sums.get(name, 0.0) + float(value) * len(batch.labels) / count
            watch(0)
        return sums

    def _batch(self, pictures: Tensor, labels: Tensor) -> Batch:
        return Batch(self.transform(pictures.to(self.device)), {"labels": labels.to(self.device)})

    def _shown(self, objective: Any, pictures: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """What the objective draws of the first samples, as uint8."""
        count = len(pictures)
        batch = self._batch(pictures, labels[:count])
        masks = self.masks.map(lambda indices: indices[:count].to(self.device))
        drawn = {name: clips.float().cpu() for name, clips in objective.pictures(batch, masks).items()}
        return {name: self.transform.normalise.undo(clips) for name, clips in drawn.items()}

    def _views(self, backbone: Any, pictures: Tensor, watch: Watch) -> Tensor:
        """uint8 [h, C, T, H, W] -> float32 [n, q, D]: the same random crops of the first n at each evaluation."""
        assert self.crops is not None
        augment = self.crops(crop_scale=self.viewer.view_scale, views=self.viewer.num_views)
        rng, vectors = generator(self.seed, 0, 0, "views"), []
        size = max(1, self.batch_size // augment.views)
        for some in pictures[: self.viewer.num_viewed].split(size):
            clips = augment(raw_batch(some, self.device), rng).clips
            vectors.append(backbone(clips).float().mean(1).cpu())
            watch(len(clips))
        return torch.cat(vectors).unflatten(0, (-1, augment.views))

    def _tuning(self, backbone: nn.Module, should_stop: Callable[[], bool]) -> Tuning:
        assert self.crops is not None
        return Tuning(
            backbone=backbone, device=self.device, seed=self.seed, autocast=self.autocast,
            train=partial(self._augmented, self.crops()), val=self._plain, should_stop=should_stop,
            num_train=len(self.split.train.indices),
        )  # fmt: skip

    def _augmented(self, augment: Augment, batch_size: int, rng: Generator) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.split.train.shuffled(self.transform, batch_size, rng):
            yield augment(raw_batch(batch.pictures, self.device), rng).clips, batch.labels.to(self.device)

    def _plain(self) -> Iterator[Tensor]:
        for batch in self.split.val.batches(self.transform, self.batch_size):
            yield self.transform(batch.pictures.to(self.device))

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


def _join(parts: Sequence[Features]) -> Features:
    vectors, labels, targets, tokens = (
        None if columns[0] is None else torch.cat(columns) for columns in zip(*parts, strict=True)
    )
    assert vectors is not None
    assert labels is not None
    return Features(vectors, labels, targets, tokens)
