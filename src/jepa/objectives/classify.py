"""Fine-tuning: encoder and head learn the labels, with the recipe of BEiT and MAE (He et al. 2022, table 9)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from copy import deepcopy
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import CutMix, MixUp

from jepa.layers.classifier import Classifier
from jepa.objectives.base import Objective, update_average
from jepa.optim import layer_scales
from jepa.types import Batch, LossOutput, Masks, NonNegative, PositiveShare, ShareBelowOne


class Classification(Objective):
    """Cross-entropy with smoothed labels; samples without a label (-1) do not count.

    The head reads the mean token, or with `pooling` attentive all tokens by a learned query (V-JEPA, section 4).
    `mixup` and `cutmix` are the alpha of their Beta distribution (Zhang et al. 2018; Yun et al. 2019); with both, one
    of them is chosen for each batch. The learning rate of block l of L is `layer_decay` ** (L - l) of the head's, that
    of the embedding one power lower (BEiT, Bao et al. 2022, appendix). With `freeze` only the head learns. With
    `momentum` an average of all weights (EMA) is evaluated, saved as the backbone and exported.
    """

    needs = {"labels"}
    predicts = "classes"

    def __init__(
        self, *, encoder: nn.Module, classes: Sequence[str], pooling: Literal["mean", "attentive"] = "mean",
        label_smoothing: ShareBelowOne = 0.1, mixup: NonNegative = 0.0, cutmix: NonNegative = 0.0,
        layer_decay: PositiveShare = 0.75, freeze: bool = False, momentum: ShareBelowOne | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if len(classes) < 2:
            raise ValueError(
                f"objective=classify: the data set has {len(classes)} classes, expected two or more; the classes of a "
                "folder are its sub-folders"
            )
        width: Any = encoder.embed_dim
        self.num_classes = len(classes)
        self.label_smoothing = label_smoothing
        self.layer_decay = layer_decay
        self.freeze = freeze
        self.momentum = momentum
        self.mixes = [mix(alpha=alpha) for mix, alpha in ((MixUp, mixup), (CutMix, cutmix)) if alpha]
        self.classifier = Classifier(
            encoder=encoder, width=width, num_classes=len(classes), attentive=pooling == "attentive"
        )
        if freeze:
            encoder.requires_grad_(False)
        self.average = None if momentum is None else deepcopy(self.classifier).requires_grad_(False).eval()

    @property
    def eval_classifier(self) -> Classifier:
        """The average of the weights if there is one."""
        return self.classifier if self.average is None else self.average

    @property
    def backbone(self) -> nn.Module:
        return self.eval_classifier.encoder

    def train(self, mode: bool = True) -> Classification:
        """The average and a frozen encoder stay in evaluation mode: they drop no path."""
        super().train(mode)
        if self.average is not None:
            self.average.eval()
        if self.freeze:
            self.classifier.encoder.eval()
        return self

    def forward(self, batch: Batch, masks: Masks) -> LossOutput:
        clips, targets = batch.clips, self.targets(batch.labels)
        if self.training and self.mixes:
            clips, targets = self.mix(clips, targets)
        with torch.no_grad() if self.freeze else nullcontext():
            tokens = self.classifier.encoder(clips)
        logits = self.classifier.read(tokens).float()
        loss = -(targets * logits.log_softmax(dim=1)).sum() / targets.sum().clamp(min=1e-6)
        correct = (logits.argmax(dim=1) == batch.labels).sum()  # never where the label is -1
        accuracy = correct / (batch.labels >= 0).sum().clamp(min=1)
        return LossOutput(loss, {"accuracy": accuracy.detach()}, tokens.float().mean(dim=1).detach())

    def targets(self, labels: Tensor) -> Tensor:
        """[B] -> float32 [B, classes]: rows sum to one, or to zero for samples without a label."""
        exact = labels[:, None] == torch.arange(self.num_classes, device=labels.device)
        smooth = exact * (1 - self.label_smoothing) + self.label_smoothing / self.num_classes
        return smooth * (labels >= 0)[:, None]

    @torch.compiler.disable()  # random numbers from the CPU, new in each step
    def mix(self, clips: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Mixes each clip with the one before it, all frames alike; draws from torch's state, seeded for each step."""
        mix = self.mixes[int(torch.randint(len(self.mixes), ()))]
        mixed, targets = mix(clips.flatten(1, 2), targets)
        return mixed.unflatten(1, clips.shape[1:3]), targets

    def classify(self, tokens: Tensor) -> Tensor:
        """[b, N, D] of the backbone -> [b, classes]"""
        return self.eval_classifier.read(tokens)

    def lr_scales(self) -> dict[str, float]:
        return layer_scales(self, self.classifier.encoder, self.layer_decay)

    @torch.no_grad()
    def after_step(self, step: int) -> dict[str, float]:
        """EMA update of the average, if there is one."""
        if self.average is None or self.momentum is None:
            return {}
        update_average(self.average.parameters(), self.classifier.parameters(), self.momentum)
        return {"momentum": self.momentum}
