"""Fine-tuning probe: a copy of the encoder and a linear head are trained on the labels."""

from __future__ import annotations

import math
from copy import deepcopy
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from jepa.evaluation.frozen import Tuning
from jepa.evaluation.probe import ClassProbe, ProbeTask, scores
from jepa.evaluation.samples import progress
from jepa.evaluation.types import Evaluation, Snapshot
from jepa.layers.classifier import Classifier
from jepa.optim import parameter_groups, set_schedule
from jepa.parallel.session import Session
from jepa.schedules import cosine, linear
from jepa.seeding import derive_seed, generator
from jepa.types import NonNegative, Positive, PositiveInt, ShareBelowOne

CLIP_GRAD = 1.0
"""Maximum norm of the gradient."""


class FineTuning(ClassProbe):
    """At step 0 it starts from random weights: a supervised baseline."""

    only_at_ends = True

    def __init__(
        self, *, epochs: PositiveInt, batch_size: PositiveInt, lr: Positive, weight_decay: NonNegative,
        warmup_ratio: ShareBelowOne,
    ) -> None:  # fmt: skip
        self.epochs = epochs
        self.batch_size = batch_size
        self.lr = lr
        self.weight_decay = weight_decay
        self.warmup_ratio = warmup_ratio
        protocol = (
            f"fine-tuned: LayerNorm of the mean token and a linear layer, trained with a copy of the encoder for "
            f"{epochs} epochs on the probe's training samples, with crops (of the pictures of the probes) and flips "
            f"as in training, by AdamW (lr {lr:g} with warm-up and cosine, weight decay {weight_decay:g}, batch "
            f"{batch_size}); the last weights count"
        )
        super().__init__(name="finetune", protocol=protocol)
        self.protocol += "; before the first step (from random weights) and after the last"

    def __call__(self, snapshot: Snapshot) -> Evaluation:
        if snapshot.tuning is None or (task := self.task(snapshot.train, snapshot.val)) is None:
            return Evaluation()
        predicted = self.tune(snapshot.tuning, task)[snapshot.val.labels >= 0]
        return Evaluation(metrics=scores("probe/finetune", predicted, task))

    def tune(self, tuning: Tuning, task: ProbeTask) -> Tensor:
        """-> [n], the predicted class of each validation sample, labelled or not; pure in the seed"""
        session = tuning.encoder.session
        with torch.random.fork_rng([session.device] if session.device.type == "cuda" else []), torch.enable_grad():
            torch.manual_seed(derive_seed(tuning.seed, 0, 0, "finetune"))
            encoder, width = deepcopy(tuning.encoder.encoder).requires_grad_(True), task.train.vectors.shape[1]
            model = Classifier(encoder=encoder, width=width, num_classes=task.num_classes)
            self._fit(model.to(session.device).train(), tuning)
        model.eval()
        predicted = []
        with torch.no_grad(), session.autocast(), progress(None, "testing", "batch") as advance:
            for clips in tuning.clips():
                predicted.append(model(clips).argmax(1).cpu())
                advance(1)
        return torch.cat(predicted)

    def _fit(self, model: nn.Module, tuning: Tuning) -> None:
        optimizer = torch.optim.AdamW(parameter_groups(model), lr=self.lr)
        rng = generator(tuning.seed, 0, 0, "finetune")
        total = self.epochs * math.ceil(len(tuning.train.split.indices) / self.batch_size)
        with progress(total, "fine-tuning", "step") as advance:
            batches = chain.from_iterable(tuning.crops(self.batch_size, rng) for _ in range(self.epochs))
            for step, (clips, labels) in enumerate(batches):
                set_schedule(optimizer, lr=self.lr_at(step, total), weight_decay=self.weight_decay)
                rows = (labels >= 0).nonzero()[:, 0]
                if len(rows):
                    _step(model, optimizer, clips[rows], labels[rows], tuning.encoder.session)
                advance(1)

    def lr_at(self, step: int, total: int) -> float:
        warmup = round(self.warmup_ratio * total)
        if step < warmup:
            return linear(step + 1, warmup, 0.0, self.lr)
        return cosine(step - warmup, total - warmup, self.lr, 0.0)


def _step(model: nn.Module, optimizer: Optimizer, clips: Tensor, labels: Tensor, session: Session) -> None:
    with session.autocast():
        loss = F.cross_entropy(model(clips).float(), labels)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), CLIP_GRAD)
    optimizer.step()
