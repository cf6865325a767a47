"""Object detection on a plain Vision Transformer (ViTDet, Li et al. 2022), with torchvision's detectors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Annotated, Any, Literal, Self

import torch
from einops import rearrange
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import LevelMapper

from jepa.layers.pyramid import STRIDES, SimpleFeaturePyramid
from jepa.layers.tokens import count_parts, token_extent
from jepa.objectives.base import Objective
from jepa.optim import layer_scales
from jepa.types import Batch, LossOutput, Masks, PositiveInt, PositiveShare, Share, Within

ASPECTS = (0.5, 1.0, 2.0)
"""Heights of the anchors of Faster R-CNN, relative to their widths."""
GROUPS = 32
"""GroupNorm groups in the head of FCOS."""
ROI_SIDE = 7
"""Side of the feature map of a proposal, in cells."""
HIDDEN = 4
"""Width of the box head's two layers, in multiples of `width`: 1024 at 256, as in torchvision."""


class Detector(Objective):
    """Faster R-CNN (Ren et al. 2015) or FCOS (Tian et al. 2019) on the encoder's tokens.

    The loss is the sum of the detector's own terms. With `freeze` only pyramid and head learn; otherwise the learning
    rate of block l of L is `layer_decay` ** (L - l) of theirs (BEiT, Bao et al. 2022, appendix). A detection needs a
    score above `score_threshold`, and of boxes of one class that overlap by more than `nms_threshold` only the best is
    kept, at most `max_found` in an image. Only for Faster R-CNN: the anchors of the finest level have a side of
    `smallest_anchor` times that of the image, which doubles from level to level, and the second stage learns from
    `regions` proposals of each image.
    """

    needs = {"boxes"}
    predicts = "boxes"
    rules = ("jepa.objectives.rules.detector", "jepa.objectives.rules.pyramid")

    def __init__(
        self, *, encoder: nn.Module, classes: Sequence[str], head: Literal["faster_rcnn", "fcos"] = "faster_rcnn",
        freeze: bool = False, layer_decay: PositiveShare = 0.75, width: PositiveInt = 256, regions: PositiveInt = 512,
        smallest_anchor: Annotated[float, Within(0, 0.5, above=True)] = 0.0625, score_threshold: Share = 0.05,
        nms_threshold: Share = 0.5, max_found: PositiveInt = 100,
    ) -> None:  # fmt: skip
        super().__init__()
        if not classes:
            raise ValueError("objective=detect: the data set has no classes to detect")
        self.encoder: Any = encoder
        self.layer_decay = layer_decay
        patch = square_patch(self.encoder)
        self.freeze = freeze
        if freeze:
            encoder.requires_grad_(False)
        self.pyramid = SimpleFeaturePyramid(input_dim=self.encoder.embed_dim, width=width)
        limits = {"score_thresh": score_threshold, "nms_thresh": nms_threshold, "detections_per_img": max_found}
        backbone: Any = nn.Identity()  # the detector gets the finished levels as images
        backbone.out_channels = width
        if head == "faster_rcnn":
            side = smallest_anchor * (self.encoder.clip_shape[2] * self.encoder.clip_shape[3]) ** 0.5
            limits = {f"box_{name}": value for name, value in limits.items()} | {"box_batch_size_per_image": regions}
            self.detector: Any = faster_rcnn(backbone, len(classes), side, patch, limits)
        else:
            self.detector = fcos(backbone, len(classes), patch, limits)
        self.detector.transform = IdentityTransform()
        self.first_label = 1 if head == "faster_rcnn" else 0  # Faster R-CNN's label 0 is the background

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.freeze:
            self.encoder.eval()
        return self

    def forward(self, batch: Batch, masks: Masks) -> LossOutput:
        """An image without boxes is background only."""
        images, tokens = self.extract(batch.clips)
        targets = [  # torchvision takes tensors without padding; their lengths make the host wait, as it does inside
            {"boxes": boxes[:, :4], "labels": boxes[:, 4].long() + self.first_label}
            for boxes in (rows[rows[:, 4] >= 0] for rows in batch.fields["boxes"])
        ]
        with torch.autocast(batch.clips.device.type, enabled=False):
            losses: dict[str, Tensor] = self.detector(images, targets)
        metrics = {name.removeprefix("loss_"): loss.detach() for name, loss in losses.items()}
        return LossOutput(torch.stack([*losses.values()]).sum(), metrics, tokens.float().mean(dim=1).detach())

    @torch.no_grad()
    def detect(self, clips: Tensor) -> list[Tensor]:
        """[B, C, 1, H, W] -> B of float32 [n, 6]: left, top, right, bottom, class, score; in eval mode."""
        images, _ = self.extract(clips)
        with torch.autocast(clips.device.type, enabled=False):
            detections = self.detector(images)
        return [
            torch.cat([one["boxes"], (one["labels"] - self.first_label)[:, None], one["scores"][:, None]], dim=1)
            for one in detections
        ]

    def extract(self, clips: Tensor) -> tuple[ImagesWithFeatures, Tensor]:
        """Images with the levels of their pyramid, and tokens [B, N, D]."""
        grid = self.encoder.grid_of(clips)
        with torch.no_grad() if self.freeze else nullcontext():
            tokens = self.encoder(clips)
        maps = self.pyramid(rearrange(tokens, "b (h w) d -> b d h w", h=grid.h, w=grid.w))
        levels = {name: level.float() for name, level in maps.items()}
        return ImagesWithFeatures(pixels=clips[:, :, 0], levels=levels), tokens

    def lr_scales(self) -> dict[str, float]:
        return layer_scales(self, self.encoder, self.layer_decay)


def square_patch(encoder: Any) -> int:
    """Side of a patch in pixels; raises ValueError if the encoder's grid has no pyramid."""
    frames, *patches = token_extent(encoder)
    if encoder.clip_shape[1] > frames:
        raise ValueError(f"num_frames={encoder.clip_shape[1]}: objective=detect takes images: use num_frames=1")
    if patches[0] != patches[1]:
        raise ValueError(f"encoder.patch_size={patches}: objective=detect takes square patches")
    for side, patch in zip(encoder.clip_shape[2:], patches, strict=True):
        count_parts(side, 2 * patch, "image side", "coarsest level", "image_size or encoder.patch_size")
    return patches[0]


def faster_rcnn(backbone: Any, num_classes: int, anchor: float, patch: int, limits: dict) -> FasterRCNN:
    """`anchor` is the side of the smallest anchor; a proposal goes to the level of its size or, as in FPN, a finer."""
    pool = MultiScaleRoIAlign([str(level) for level in range(len(STRIDES))], ROI_SIDE, sampling_ratio=2)
    pool.scales = [1 / (stride * patch) for stride in STRIDES]  # torchvision would round them to powers of two
    pool.map_levels = LevelMapper(0, len(STRIDES) - 1, canonical_scale=2 * anchor, canonical_level=0)  # pyright: ignore
    sides = tuple((anchor * 2**level,) for level in range(len(STRIDES)))
    hidden = HIDDEN * backbone.out_channels
    return FasterRCNN(
        backbone,
        rpn_anchor_generator=AnchorGenerator(sides, (ASPECTS,) * len(STRIDES)),  # pyright: ignore[reportArgumentType]
        box_roi_pool=pool,
        box_head=TwoMLPHead(backbone.out_channels * ROI_SIDE**2, hidden),
        box_predictor=FastRCNNPredictor(hidden, num_classes + 1),
        **limits,
    )


def fcos(backbone: Any, num_classes: int, patch: int, limits: dict) -> FCOS:
    """An anchor is one cell of its level: a level predicts boxes whose edges are 4 to 8 cells away."""
    if backbone.out_channels % GROUPS:
        raise ValueError(f"objective.width={backbone.out_channels}: head=fcos takes a multiple of {GROUPS}")
    sides = tuple((stride * patch,) for stride in STRIDES)
    generator = AnchorGenerator(sides, ((1.0,),) * len(STRIDES))  # pyright: ignore[reportArgumentType]
    return FCOS(backbone, num_classes, anchor_generator=generator, **limits)


class ImagesWithFeatures:
    """In place of torchvision's ImageList: the images, and as `tensors` the levels of their pyramid."""

    def __init__(self, *, pixels: Tensor, levels: dict[str, Tensor]) -> None:
        self.pixels = pixels
        self.tensors = FeatureLevels(levels)
        self.tensors.shape = pixels.shape
        self.image_sizes = [(pixels.shape[-2], pixels.shape[-1])] * len(pixels)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.pixels)


class FeatureLevels(OrderedDict[str, Tensor]):
    """Maps of a pyramid, with the `shape` of the images, which torchvision's anchors read."""

    shape: torch.Size


class IdentityTransform(nn.Module):
    """In place of torchvision's transform: images are already normalised and resized, boxes stay in their pixels."""

    def forward(self, images: ImagesWithFeatures, targets: list | None = None) -> tuple[Any, list | None]:
        return images, targets

    def postprocess(self, detections: list, sizes: list, original_sizes: list) -> list:
        return detections
