"""Augmentation and letterboxing of pictures with boxes, by torchvision.transforms.v2.

A picture keeps its aspect ratio: it is scaled to fit into `image_size`, placed in the upper left corner, and the rest
is filled with the mean colour.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from jepa.data.transforms import Augment, Normalise
from jepa.types import Batch, RawBatch

CROP_DRAWS = 5
"""Number of uniform random numbers of a crop: scale, aspect ratio, row, column, flip."""
NO_BOX = -1.0
"""Class of a row that is padding or a box outside of the crop."""


class CropBox(NamedTuple):
    """The picture is scaled to `size`, cropped from `corner` on, and flipped."""

    size: tuple[int, int]
    corner: tuple[int, int]
    is_flipped: bool


class BoxAugment(Augment):
    """(RawBatch with boxes, generator) -> Batch on its device: random scale, aspect ratio, crop, flip, colours.

    The picture is enlarged so that the crop shows the share `crop_scale` of its area (large-scale jittering, Ghiasi et
    al. 2021, without shrinking), with its aspect ratio changed by `crop_aspect`. Boxes are clipped to the crop; those
    with a side below one pixel get the class NO_BOX. Sample i does not depend on the batch size. Everything random
    comes from the CPU generator.
    """

    @property
    def short_side(self) -> int:
        """Shorter side of a decoded image at which the smallest crop is just not enlarged."""
        return math.ceil(max(self.image_size) / math.sqrt(self.crop_scale[0] * min(1.0, self.crop_aspect[0])))

    def __call__(
        self, raw: RawBatch, generator: Generator, rows: Callable[[Tensor], Tensor] | None = None, parts: int = 1
    ) -> Batch:
        """`raw` is one of `parts` equal parts of the batch; `rows` selects its rows of the whole batch's numbers."""
        uniform = torch.rand(len(raw.sizes) * parts, CROP_DRAWS + self.colour.num_draws, generator=generator)
        uniform = uniform if rows is None else rows(uniform)
        count, _, frames, *_ = raw.pixels.shape
        clips = empty_clips(self.normalise.mean, count, frames, self.image_size, raw.pixels.device)
        cropped_boxes = []
        pictures = zip(clips, raw.pixels, raw.sizes.tolist(), raw.fields["boxes"], uniform.tolist(), strict=True)
        for clip, pixels, size, boxes, draws in pictures:
            crop = self.crop_box(size, draws[:CROP_DRAWS])
            cropped_boxes.append(draw_crop(clip, pixels[..., : size[0], : size[1]], boxes, crop))
        if self.colour.num_draws:
            draws = uniform[:, CROP_DRAWS:].to(clips.device, non_blocking=True)
            clips = torch.cat([self.colour(*row) for row in zip(clips.split(1), draws.split(1), strict=True)])
        return Batch(self.normalise(clips), raw.fields | {"boxes": torch.stack(cropped_boxes)})

    def crop_box(self, size: Sequence[int], uniform: Sequence[float]) -> CropBox:
        """The crop of a picture of height and width, from CROP_DRAWS numbers in [0, 1)."""
        scale, aspect, row, column, flip = uniform
        low, high = self.crop_scale
        zoom = 1 / math.sqrt(low + (high - low) * scale)
        narrow, wide = map(math.log, self.crop_aspect)
        stretch = math.exp((narrow + (wide - narrow) * aspect) / 2)
        height, width = scaled_size(size, self.image_size, zoom)
        height, width = max(1, round(height / stretch)), max(1, round(width * stretch))
        slack = [max(0, side - target) for side, target in zip((height, width), self.image_size, strict=True)]
        corner = int(row * (slack[0] + 1)), int(column * (slack[1] + 1))
        return CropBox((height, width), corner, self.flip and flip < 0.5)


class Letterbox:
    """uint8 pictures [C, 1, H, W] of any sizes -> normalised clips [B, C, 1, h, w] that show the whole pictures."""

    def __init__(self, *, image_size: tuple[int, int], mean: Sequence[float], std: Sequence[float]) -> None:
        self.image_size = image_size
        self.normalise = Normalise(mean, std)

    def __call__(self, pictures: Sequence[Tensor]) -> Tensor:
        clips = empty_clips(self.normalise.mean, len(pictures), 1, self.image_size, pictures[0].device)
        for clip, picture in zip(clips, pictures, strict=True):
            size = scaled_size(picture.shape[-2:], self.image_size)
            draw_crop(clip, picture, torch.zeros(0, 5), CropBox(size, (0, 0), is_flipped=False))
        return self.normalise(clips)

    def restore(self, boxes: Tensor, size: Sequence[int]) -> Tensor:
        """Boxes [n, 4] in a clip -> boxes [n, 4] in its picture of height and width `size`, clipped to it."""
        height, width = scaled_size(size, self.image_size)
        in_clip = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width))  # pyright: ignore
        return F.resize(F.clamp_bounding_boxes(in_clip), list(size)).as_subclass(Tensor)


def scaled_size(size: Sequence[int], target: Sequence[int], zoom: float = 1.0) -> tuple[int, int]:
    """Height and width of a picture scaled to fit into `target`, times `zoom`."""
    ratio = zoom * min(target[0] / size[0], target[1] / size[1])
    return max(1, round(size[0] * ratio)), max(1, round(size[1] * ratio))


def empty_clips(mean: Sequence[float], count: int, frames: int, size: Sequence[int], device: torch.device) -> Tensor:
    """-> float [count, C, frames, h, w] of the mean colour"""
    fill = 255 * torch.tensor(mean, device=device).view(-1, 1, 1, 1)
    return fill.expand(count, -1, frames, *size).clone()


def draw_crop(clip: Tensor, pixels: Tensor, boxes: Tensor, crop: CropBox) -> Tensor:
    """Draw the crop of uint8 [C, T, H, W] into float [C, T, h, w]; boxes [M, 5] -> boxes [M, 5] in the clip."""
    size = pixels.shape[-2], pixels.shape[-1]
    frames = tv_tensors.Image(pixels.transpose(0, 1))  # [T, C, H, W]
    edges = tv_tensors.BoundingBoxes(boxes[:, :4], format="XYXY", canvas_size=size)  # pyright: ignore
    window = [min(side, target) for side, target in zip(crop.size, clip.shape[-2:], strict=True)]
    cropped = []
    for item in (frames, edges):
        item = F.crop(F.resize(item, list(crop.size), antialias=True), *crop.corner, *window)
        cropped.append(F.horizontal_flip(item) if crop.is_flipped else item)
    clip[..., : window[0], : window[1]] = cropped[0].as_subclass(Tensor).transpose(0, 1)
    edges = F.clamp_bounding_boxes(cropped[1], clamping_mode="hard")
    is_box = F.sanitize_bounding_boxes(edges)[1] & (boxes[:, 4] >= 0)
    classes = torch.where(is_box, boxes[:, 4], NO_BOX)
    return torch.cat([edges.as_subclass(Tensor), classes[:, None]], dim=1)
