"""From decoded uint8 images to the encoder's input: random crops of each sample, computed in batch on their device.

Resampling is bilinear with antialiasing, the default of torchvision's RandomResizedCrop on Pillow images and of I-JEPA.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor
from torch.nn.functional import interpolate

from jepa.data.colour import Colour
from jepa.data.decode import ImageSource, as_pixels
from jepa.types import Batch, RawBatch

ATTEMPTS = 10
"""Random boxes tried before the largest central one is taken, as in torchvision's RandomResizedCrop."""
BOX_DRAWS = 2 * ATTEMPTS + 3
"""Number of uniform random numbers of a crop: areas, aspect ratios, row, column, flip."""
SMALL_SIDE = 40
"""Largest side in pixels up to which the dense route is faster on a CPU (measured on images; never on clips)."""
CHUNK = {"cpu": 2**17, "accelerator": 2**26}
"""Pixel values processed at a time as float32: they fit into a core's cache, or take 256 MB."""


class Augment:
    """(RawBatch, generator) -> Batch on its device: random resized crop, flip, colours, normalise.

    The boxes are those of torchvision's RandomResizedCrop, drawn independently for each of the `views` and
    `local_views` of a sample; the latter are smaller crops (multi-crop, Caron et al. 2020). Rows v * views to
    v * views + views - 1 show sample v. All frames of a clip share one box and one change of colours. Sample i does not
    depend on the batch size. Everything random comes from the CPU generator.
    """

    def __init__(
        self, *, image_size: tuple[int, int], crop_scale: tuple[float, float], crop_aspect: tuple[float, float],
        flip: bool, mean: Sequence[float], std: Sequence[float], views: int = 1, jitter: float = 0.0,
        grayscale: float = 0.0, blur: float = 0.0, solarize: float = 0.0, local_views: int = 0,
        local_scale: tuple[float, float] = (0.05, 0.3), local_size: tuple[int, int] | None = None,
    ) -> None:  # fmt: skip
        _check_size(image_size)
        if local_views and local_size is None:
            raise ValueError(f"augment.local_views={local_views}: expected 0, or a local_size beside")
        self.image_size = image_size
        self.crop_scale = crop_scale
        self.crop_aspect = crop_aspect
        self.flip = flip
        self.views = views
        self.local_views = local_views
        self.local_scale = local_scale
        self.local_size = local_size or image_size
        self.normalise = Normalise(mean, std)
        self.colour = Colour(channels=len(mean), jitter=jitter, grayscale=grayscale, blur=blur, solarize=solarize)

    @property
    def short_side(self) -> int:
        """Shorter side of a decoded image at which the smallest crop is just not enlarged."""
        side = max(self.image_size) / math.sqrt(self.crop_scale[0])
        local = max(self.local_size) / math.sqrt(self.local_scale[0]) if self.local_views else 0
        return math.ceil(max(side, local))

    def __call__(
        self, raw: RawBatch, generator: Generator, rows: Callable[[Tensor], Tensor] | None = None, parts: int = 1
    ) -> Batch:
        """`raw` is one of `parts` equal parts of the batch; `rows` selects its rows of the whole batch's numbers."""
        num_crops, num_draws = self.views + self.local_views, BOX_DRAWS + self.colour.num_draws
        uniform = torch.rand(len(raw.sizes) * parts, num_crops, num_draws, generator=generator)
        uniform = (uniform if rows is None else rows(uniform)).to(raw.sizes.device, non_blocking=True)
        clips = self._crops(raw, uniform[:, : self.views], self.crop_scale, self.image_size)
        local = None
        if self.local_views:
            local = self._crops(raw, uniform[:, self.views :], self.local_scale, self.local_size)
        fields = {name: field.repeat_interleave(self.views, dim=0) for name, field in raw.fields.items()}
        return Batch(clips, fields, self.views, local)

    def _crops(self, raw: RawBatch, uniform: Tensor, scale: tuple[float, float], size: tuple[int, int]) -> Tensor:
        """[B, V, draws] -> [B V, C, T, h, w]"""
        sizes = raw.sizes.repeat_interleave(uniform.shape[1], dim=0)
        uniform = uniform.flatten(0, 1)
        boxes, flips = draw_boxes(sizes, uniform, scale, self.crop_aspect)
        flips = flips if self.flip else None
        if not self.colour.num_draws:
            return resample(raw.pixels, boxes, size, flips, self.normalise)
        clips = resample(raw.pixels, boxes, size, flips)
        rows = _rows_per_chunk(clips.device, clips[0].numel())
        for part, draws in zip(clips.split(rows), uniform[:, BOX_DRAWS:].split(rows), strict=True):
            part.copy_(self.normalise(self.colour(part, draws)))
        return clips


def _rows_per_chunk(device: torch.device, row_size: int) -> int:
    return max(1, CHUNK["cpu" if device.type == "cpu" else "accelerator"] // row_size)


def draw_boxes(
    sizes: Tensor, uniform: Tensor, crop_scale: tuple[float, float], crop_aspect: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """[B, 2], [B, BOX_DRAWS or more] -> long [B, 4] (top, left, height, width), and bool [B]: whether to flip."""
    scale, aspect = uniform[:, : 2 * ATTEMPTS].unflatten(1, (2, ATTEMPTS)).unbind(1)  # [B, ATTEMPTS] each
    size = sizes.float()
    area = size.prod(1, keepdim=True) * _between(crop_scale, scale)
    ratio = _between((math.log(crop_aspect[0]), math.log(crop_aspect[1])), aspect).exp()
    candidates = torch.stack([(area / ratio).sqrt().round(), (area * ratio).sqrt().round()], dim=-1)  # [B, ATTEMPTS, 2]
    fits = ((candidates >= 1) & (candidates <= size[:, None])).all(dim=-1)
    first = candidates[torch.arange(len(sizes), device=sizes.device), fits.int().argmax(dim=1)]  # [B, 2]
    any_fits = fits.any(dim=1, keepdim=True)
    shape = torch.where(any_fits, first, _central(size, crop_aspect))
    margin = size - shape
    relative = uniform[:, 2 * ATTEMPTS : BOX_DRAWS - 1]  # [B, 2]
    corner = torch.where(any_fits, (relative * (margin + 1)).floor().minimum(margin), (margin / 2).floor())
    return torch.cat([corner, shape], dim=1).long(), uniform[:, BOX_DRAWS - 1] < 0.5


def _between(bounds: tuple[float, float], uniform: Tensor) -> Tensor:
    return bounds[0] + (bounds[1] - bounds[0]) * uniform


def _central(size: Tensor, aspect: tuple[float, float]) -> Tensor:
    """[B, 2] -> [B, 2]: the largest height and width with an aspect ratio within the bounds."""
    height, width = size.unbind(1)
    widest = torch.minimum(width, (height * aspect[1]).round().clamp(min=1))
    tallest = torch.minimum(height, (width / aspect[0]).round().clamp(min=1))
    return torch.stack([tallest, widest], dim=1)


class EvalTransform:
    """Images or clips of any size -> float [B, C, T, H, W]: centre crop, resized and normalised.

    Takes uint8 tensors [C, H, W], [B, C, H, W] or [B, C, T, H, W], uint8 arrays of numpy [H, W, C] or [B, H, W, C],
    images of Pillow, paths of image files, or a list of images or of clips [C, T, H, W], also of different sizes.
    """

    def __init__(self, *, image_size: tuple[int, int], mean: Sequence[float], std: Sequence[float]) -> None:
        _check_size(image_size)
        self.image_size = image_size
        self.normalise = Normalise(mean, std)

    def __call__(self, images: ImageSource | Sequence[ImageSource]) -> Tensor:
        return self.normalise(self.pictures(images).float())

    def pictures(self, images: ImageSource | Sequence[ImageSource]) -> Tensor:
        """The images before normalisation: uint8 [B, C, T, H, W]."""
        channels = len(self.normalise.shift)
        if isinstance(images, list | tuple):
            if not images:
                raise ValueError("an empty list of images; expected at least one")
            images = [as_pixels(image, channels) for image in images]
            if len({image.shape for image in images}) > 1:
                return torch.cat([self.pictures(image[None]) for image in images])
            images = torch.stack(images)  # eight times faster for small ones
        clips = _as_clips(as_pixels(images, channels))
        if clips.dtype != torch.uint8:
            raise ValueError(f"images of type {clips.dtype}; expected uint8 pixels from 0 to 255, before normalising")
        if clips.shape[1] != channels:
            raise ValueError(
                f"images of shape {tuple(clips.shape)} have {clips.shape[1]} channels; expected {channels}"
            )
        box = torch.tensor(_central_box(clips.shape[-2:], self.image_size), device=clips.device)
        return resample(clips, box.expand(len(clips), 4), self.image_size).round_().to(torch.uint8)


def _as_clips(images: Tensor) -> Tensor:
    """[C, H, W], [B, C, H, W] or [B, C, T, H, W] -> [B, C, T, H, W]"""
    if images.ndim not in (3, 4, 5):
        raise ValueError(f"images of shape {tuple(images.shape)}; expected [B, C, H, W], [B, C, T, H, W] or a list")
    images = images[None] if images.ndim == 3 else images
    return images.unsqueeze(2) if images.ndim == 4 else images


def _central_box(size: Sequence[int], target: tuple[int, int]) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the largest central box with the target's aspect ratio."""
    ratio = min(size[0] / target[0], size[1] / target[1])
    height, width = (min(limit, max(1, round(side * ratio))) for limit, side in zip(size, target, strict=True))
    return (size[0] - height) // 2, (size[1] - width) // 2, height, width


class Normalise:
    """float [..., C, T, H, W] of 0 to 255 -> (x / 255 - mean) / std, in place"""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        if len(mean) != len(std) or min(std) <= 0:
            raise ValueError(f"mean={list(mean)} std={list(std)}: expected one pair for each channel, std above 0")
        self.mean, self.std = tuple(mean), tuple(std)
        deviation = torch.tensor(std)
        self.scale = (1 / (255 * deviation)).view(-1, 1, 1, 1)
        self.shift = (torch.tensor(mean) / deviation).view(-1, 1, 1, 1)

    def __call__(self, clips: Tensor) -> Tensor:
        return clips.mul_(self.scale.to(clips.device)).sub_(self.shift.to(clips.device))

    def undo(self, clips: Tensor) -> Tensor:
        """Normalised [..., C, T, H, W] -> uint8"""
        pixels = (clips + self.shift.to(clips.device)) / self.scale.to(clips.device)
        return pixels.nan_to_num_().round_().clamp_(0, 255).to(torch.uint8)


def resample(
    pixels: Tensor, boxes: Tensor, size: tuple[int, int], flips: Tensor | None = None,
    normalise: Normalise | None = None,
) -> Tensor:  # fmt: skip
    """uint8 [B, C, T, H, W], [B V, 4], bool [B V] -> float [B V, C, T, h, w]: each sample's V boxes, resized.

    Both routes are antialiased and agree to one grey level: on a CPU torch's uint8 kernel sample by sample for clips
    and large images, elsewhere two batched products with the weights of the separable filter.
    """
    frames, *sides = pixels.shape[2:]
    if pixels.device.type == "cpu" and (frames > 1 or max(sides) > SMALL_SIDE):
        return resample_singly(pixels, boxes, size, flips, normalise)
    return resample_densely(pixels, boxes, size, flips, normalise)


def resample_singly(
    pixels: Tensor, boxes: Tensor, size: tuple[int, int], flips: Tensor | None, normalise: Normalise | None
) -> Tensor:
    """As `resample`, sample by sample; each one is normalised while it is in the cache."""
    clips = torch.empty(len(boxes), *pixels.shape[1:3], *size)
    flips_list = [False] * len(boxes) if flips is None else flips.tolist()
    sources = (frames for frames in pixels.transpose(1, 2) for _ in range(len(boxes) // len(pixels)))
    for clip, frames, box, flip in zip(clips, sources, boxes.tolist(), flips_list, strict=True):
        top, left, height, width = box
        crop = frames[..., top : top + height, left : left + width]  # [T, C, height, width]
        resized = interpolate(crop, size, mode="bilinear", antialias=True)
        clip.copy_((resized.flip(-1) if flip else resized).transpose(0, 1))
        if normalise is not None:
            normalise(clip)
    return clips


def resample_densely(
    pixels: Tensor, boxes: Tensor, size: tuple[int, int], flips: Tensor | None, normalise: Normalise | None
) -> Tensor:
    """As `resample`, without a loop over samples or a host synchronisation."""
    views = len(boxes) // len(pixels)
    clips = torch.empty(len(boxes), *pixels.shape[1:3], *size, device=pixels.device)
    samples = _rows_per_chunk(pixels.device, views * pixels[0].numel())
    for start in range(0, len(pixels), samples):
        part = slice(start * views, (start + samples) * views)
        sources = pixels[start : start + samples, None].expand(-1, views, -1, -1, -1, -1).flatten(0, 1)
        rows = filter_weights(boxes[part, 0], boxes[part, 2], pixels.shape[-2], size[0])
        part_flips = None if flips is None else flips[part]
        columns = filter_weights(boxes[part, 1], boxes[part, 3], pixels.shape[-1], size[1], part_flips)
        clips[part] = _separable(sources, rows, columns)
        if normalise is not None:
            normalise(clips[part])
    return clips


def _separable(pixels: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """[B, C, T, H, W], [B, h, H], [B, w, W] -> [B, C, T, h, w]"""
    _, channels, frames, height, _ = pixels.shape
    lines = pixels.permute(0, 3, 1, 2, 4).contiguous().float().flatten(1, 3)  # [B, H C T, W]
    narrow = torch.bmm(lines, columns.mT).unflatten(1, (height, -1)).flatten(2)  # [B, H, C T w]
    small = torch.bmm(rows, narrow).unflatten(2, (channels, frames, -1))  # [B, h, C, T, w]
    return small.permute(0, 2, 3, 1, 4)


def filter_weights(start: Tensor, length: Tensor, num_in: int, num_out: int, flips: Tensor | None = None) -> Tensor:
    """[B], [B], bool [B] -> [B, num_out, num_in]: antialiased bilinear weights, zero outside of the box."""
    start, length = start.float()[:, None], length.float()[:, None]
    ratio = length / num_out
    radius = ratio.clamp(min=1)
    outputs = torch.arange(num_out, device=start.device) + 0.5  # [num_out]
    if flips is not None:
        outputs = torch.where(flips[:, None], num_out - outputs, outputs)  # [B, num_out]
    inputs = torch.arange(num_in, device=start.device) + 0.5 - start  # [B, num_in]
    inputs = inputs.masked_fill((inputs < 0) | (inputs > length), math.inf)
    distance = ((inputs / radius)[:, None] - (outputs * (ratio / radius))[..., None]).abs_()  # [B, num_out, num_in]
    weights = torch.rsub(distance, 1).clamp_(min=0)
    return weights.div_(weights.sum(dim=-1, keepdim=True))


def _check_size(image_size: tuple[int, int]) -> None:
    if len(image_size) != 2 or min(image_size) < 1:
        raise ValueError(f"image_size={image_size}: expected a height and a width of at least 1 pixel")
