"""From decoded pictures with boxes to what a detector sees: both are moved alike, by torchvision's v2.

A picture keeps its proportions: it is scaled to fit into `image_size` and stands in the upper left corner, the rest is
the mean grey.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from jepa.data.colour import Colour
from jepa.data.transforms import Normalise
from jepa.types import Batch, RawBatch

NUM_PLACES = 5
"""uniform numbers that a picture needs besides those of its colours: scale, proportions, row, column, mirror"""
NONE = -1.0
"""class of a row that is no box"""


class CropBox(NamedTuple):
    """A picture is scaled to `size`, of which a window is cut out at `corner` and mirrored."""

    size: tuple[int, int]
    corner: tuple[int, int]
    is_mirrored: bool


class BoxAugment:
    """(RawBatch with boxes, generator) -> Batch on its device: scale, proportions, place, flip, colours, normalise.

    What is seen is a window of `crop_scale` of the area of a picture that fits (large-scale jittering, Ghiasi et al.
    2021, without the part that makes pictures smaller), its proportions changed by `crop_aspect`. Boxes are clipped to
    the window; what is left of them with less than a pixel a side is no box. Sample i does not depend on the batch
    size. Everything random comes from the CPU generator.
    """

    views, local_views, local_size = 1, 0, (0, 0)
    """one crop of each sample and no smaller ones"""

    def __init__(
        self,
        *,
        image_size: tuple[int, int],
        crop_scale: Sequence[float],
        crop_aspect: Sequence[float],
        flip: bool,
        mean: Sequence[float],
        std: Sequence[float],
        jitter: float = 0.0,
        grayscale: float = 0.0,
        blur: float = 0.0,
        solarize: float = 0.0,
    ) -> None:
        self.image_size = image_size
        self.crop_scale = crop_scale
        self.crop_aspect = crop_aspect
        self.flip = flip
        self.canvas = math.ceil(max(image_size) / math.sqrt(crop_scale[0] * min(1.0, crop_aspect[0])))
        self.grey = 255 * torch.tensor(mean).view(-1, 1, 1, 1)
        self.normalise = Normalise(mean, std)
        self.colour = Colour(channels=len(mean), jitter=jitter, grayscale=grayscale, blur=blur, solarize=solarize)

    def __call__(
        self, raw: RawBatch, generator: Generator, rows: Callable[[Tensor], Tensor] | None = None, parts: int = 1
    ) -> Batch:
        """Where `raw` is one of `parts` equal parts of the batch, `rows` takes its own of the numbers drawn for all."""
        uniform = torch.rand(len(raw.sizes) * parts, NUM_PLACES + self.colour.num_draws, generator=generator)
        uniform = uniform if rows is None else rows(uniform)
        clips = empty_clips(self.grey, len(raw.sizes), raw.pixels.shape[2], self.image_size, raw.pixels.device)
        boxes = []
        pictures = zip(clips, raw.pixels, raw.sizes.tolist(), raw.fields["boxes"], uniform.tolist(), strict=True)
        for clip, pixels, size, own, draws in pictures:
            placing = self.placing(size, draws[:NUM_PLACES])
            boxes.append(draw_crop(clip, pixels[..., : size[0], : size[1]], own, placing))
        if self.colour.num_draws:
            draws = uniform[:, NUM_PLACES:].to(clips.device, non_blocking=True)
            clips = torch.cat([self.colour(*one) for one in zip(clips.split(1), draws.split(1), strict=True)])
        return Batch(self.normalise(clips), raw.fields | {"boxes": torch.stack(boxes)})

    def placing(self, size: Sequence[int], uniform: Sequence[float]) -> CropBox:
        """Of a picture of height and width, by NUM_PLACES numbers in [0, 1)."""
        scale, aspect, row, column, mirror = uniform
        low, high = self.crop_scale
        zoom = 1 / math.sqrt(low + (high - low) * scale)
        narrow, wide = map(math.log, self.crop_aspect)
        stretch = math.exp((narrow + (wide - narrow) * aspect) / 2)
        shown = scaled_size(size, self.image_size, zoom)
        height, width = max(1, round(shown[0] / stretch)), max(1, round(shown[1] * stretch))
        spare = [max(0, side - target) for side, target in zip((height, width), self.image_size, strict=True)]
        corner = int(row * (spare[0] + 1)), int(column * (spare[1] + 1))
        return CropBox((height, width), corner, self.flip and mirror < 0.5)


class Letterbox:
    """uint8 pictures [C, 1, H, W] of any sizes -> normalised clips [B, C, 1, h, w]: all of each, in its proportions."""

    def __init__(self, *, image_size: tuple[int, int], mean: Sequence[float], std: Sequence[float]) -> None:
        self.image_size = image_size
        self.grey = 255 * torch.tensor(mean).view(-1, 1, 1, 1)
        self.normalise = Normalise(mean, std)

    def __call__(self, pictures: Sequence[Tensor]) -> Tensor:
        clips = empty_clips(self.grey, len(pictures), 1, self.image_size, pictures[0].device)
        for clip, picture in zip(clips, pictures, strict=True):
            size = scaled_size(picture.shape[-2:], self.image_size)
            draw_crop(clip, picture, torch.zeros(0, 5), CropBox(size, (0, 0), is_mirrored=False))
        return self.normalise(clips)

    def restore(self, boxes: Tensor, size: Sequence[int]) -> Tensor:
        """Boxes [n, 4] in such a clip -> in the picture of height and width that it shows, clipped to it."""
        height, width = scaled_size(size, self.image_size)
        in_clip = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width))  # pyright: ignore
        return F.resize(F.clamp_bounding_boxes(in_clip), list(size)).as_subclass(Tensor)


def scaled_size(size: Sequence[int], target: Sequence[int], zoom: float = 1.0) -> tuple[int, int]:
    """The height and width of a picture that is scaled to fit, and then enlarged."""
    ratio = zoom * min(target[0] / size[0], target[1] / size[1])
    return max(1, round(size[0] * ratio)), max(1, round(size[1] * ratio))


def empty_clips(grey: Tensor, count: int, frames: int, size: Sequence[int], device: torch.device) -> Tensor:
    """-> float [count, C, frames, h, w] of the colour `grey` [C, 1, 1, 1]"""
    return grey.to(device).expand(count, -1, frames, *size).clone()


def draw_crop(clip: Tensor, pixels: Tensor, boxes: Tensor, placing: CropBox) -> Tensor:
    """Draws uint8 [C, T, H, W] into float [C, T, h, w]; boxes [M, 5] -> where they are then, class NONE where gone."""
    canvas = pixels.shape[-2], pixels.shape[-1]
    frames = tv_tensors.Image(pixels.transpose(0, 1))  # [T, C, H, W]
    edges = tv_tensors.BoundingBoxes(boxes[:, :4], format="XYXY", canvas_size=canvas)  # pyright: ignore
    window = [min(side, target) for side, target in zip(placing.size, clip.shape[-2:], strict=True)]
    moved = []
    for item in (frames, edges):
        item = F.crop(F.resize(item, list(placing.size), antialias=True), *placing.corner, *window)
        moved.append(F.horizontal_flip(item) if placing.is_mirrored else item)
    clip[..., : window[0], : window[1]] = moved[0].as_subclass(Tensor).transpose(0, 1)
    edges = F.clamp_bounding_boxes(moved[1], clamping_mode="hard")
    is_box = F.sanitize_bounding_boxes(edges)[1] & (boxes[:, 4] >= 0)
    classes = torch.where(is_box, boxes[:, 4], NONE)
    return torch.cat([edges.as_subclass(Tensor), classes[:, None]], dim=1)
