"""Pictures made of tensors: rows of tiles, mask overlays, false colours. Everything is uint8 RGB on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.functional import pil_to_tensor

from jepa.types import PatchGrid

GAP = 4
"""White pixels around a tile."""
TILE = 96
"""Smallest side of a readable tile in pixels."""
LABEL_HEIGHT = 16
MAX_FRAMES = 8
"""Frames shown of a clip."""
MAX_CLIPS = 4
"""Clips in a picture, which shows more images."""
BLOCK_COLOURS = ((230, 60, 50), (40, 120, 230), (30, 170, 90), (240, 160, 20), (150, 70, 200), (20, 180, 190))
HEATMAP_STOPS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
"""Colours from dark to bright, close to viridis."""


def to_rgb(images: Tensor) -> Tensor:
    """[..., C, h, w] -> [..., 3, h, w]: the first three channels; one channel is grey, two have no blue."""
    if images.shape[-3] == 1:
        return images.expand(*images.shape[:-3], 3, -1, -1)
    return F.pad(images, (0, 0, 0, 0, 0, max(0, 3 - images.shape[-3])))[..., :3, :, :]


def enlarge(images: Tensor, side: int = TILE) -> Tensor:
    """[..., h, w] -> [..., f * h, f * w]: pixels repeated f times, so that the shorter side is at least `side`."""
    factor = max(1, -(-side // min(images.shape[-2:])))
    return images.repeat_interleave(factor, -2).repeat_interleave(factor, -1)


def resize_nearest(images: Tensor, size: Sequence[int]) -> Tensor:
    """[..., 3, h, w] -> [..., 3, *size] by nearest-neighbour interpolation"""
    return F.interpolate(images.flatten(0, -4), tuple(size), mode="nearest").unflatten(0, images.shape[:-3])


def montage(rows: Sequence[Tensor]) -> Tensor:
    """Rows of tiles [n, 3, h, w], n and h may differ from row to row -> [H, W, 3] on white."""
    strips = []
    width = max(len(row) * (row.shape[-1] + GAP) + GAP for row in rows)
    for row in rows:
        framed = F.pad(row, (GAP, 0, GAP, 0), value=255)  # [n, 3, h + GAP, w + GAP]
        strip = framed.permute(2, 0, 3, 1).flatten(1, 2)  # [h + GAP, n * (w + GAP), 3]
        strips.append(F.pad(strip, (0, 0, 0, width - strip.shape[1]), value=255))
    return F.pad(torch.cat(strips), (0, 0, 0, 0, 0, GAP), value=255)


def rows_of_tiles(*columns: Tensor, per_row: int = 4) -> list[Tensor]:
    """Several [n, F, 3, h, w] of the same samples -> rows [m, 3, h, w], each column's below the one before.

    A row has `per_row` images, or the F frames of a clip; only the first clips are shown.
    """
    if columns[0].shape[1] > 1:
        per_row, columns = 1, tuple(clips[:MAX_CLIPS] for clips in columns)
    rows = zip(*(tiles.split(per_row) for tiles in columns), strict=True)
    return [tiles.flatten(0, 1) for row in rows for tiles in row]


def frame_indices(num_frames: int) -> list[int]:
    """At most MAX_FRAMES evenly spaced frames of a clip."""
    num = min(num_frames, MAX_FRAMES)
    return [(2 * i + 1) * num_frames // (2 * num) for i in range(num)]


def frame_tiles(clips: Tensor) -> Tensor:
    """[..., C, T, h, w] -> [..., F, 3, h, w], evenly spaced frames"""
    return to_rgb(clips[..., frame_indices(clips.shape[-3]), :, :].transpose(-4, -3))


def mask_overlay(images: Tensor, context: Tensor, targets: Tensor, grid: PatchGrid, step: int = 0) -> Tensor:
    """[n, 3, H, W], [n, K], [n, M, J] -> [n, 3, H, W]: target blocks of a time step tinted, hidden tokens dark."""
    brightness = torch.full((len(images), grid.num_tokens), 0.2).scatter_(1, context, 1.0)
    tint = torch.zeros(len(images), grid.num_tokens, 3)
    for block, tokens in enumerate(targets.unbind(1)):
        colour = 0.6 * torch.tensor(BLOCK_COLOURS[block % len(BLOCK_COLOURS)]).float()
        tint.scatter_(1, tokens[..., None].expand(-1, -1, 3), colour.expand(*tokens.shape, 3))
        brightness.scatter_(1, tokens, 0.4)
    maps = [_on_grid(values, grid)[:, :, step] for values in (brightness[..., None], tint)]
    factor, colours = (resize_nearest(values, images.shape[-2:]) for values in maps)
    return (images * factor + colours).clamp(0, 255).byte()


def principal_colours(tokens: Tensor, grid: PatchGrid) -> tuple[Tensor, list[float]]:
    """[n, N, D] -> the three principal components as colours [n, 3, t, h, w], and their shares of the variance"""
    centred = tokens.double().flatten(0, 1)
    centred = centred - centred.mean(0)
    variances, directions = torch.linalg.eigh(centred.T @ centred)  # ascending
    directions = directions[:, -3:].flip(1)
    directions = directions * directions.gather(0, directions.abs().argmax(0, keepdim=True)).sign()
    values = F.pad(centred @ directions, (0, 3 - directions.shape[1]))  # [n * N, 3]
    low, high = values.quantile(0.02, dim=0), values.quantile(0.98, dim=0)
    colours = ((values - low) / (high - low).clamp_min(1e-12) * 255).clamp(0, 255).round().byte()
    shares = variances.flip(0)[:3] / variances.sum().clamp_min(1e-12)
    return _on_grid(colours.unflatten(0, tokens.shape[:2]), grid), shares.tolist()


def heatmap(values: Tensor) -> Tensor:
    """[n, h, w] in [0, 1] -> [n, 3, h, w], dark to bright"""
    stops = torch.tensor(HEATMAP_STOPS).float()
    position = values.clamp(0, 1) * (len(stops) - 1)
    lower = position.floor().long().clamp_max(len(stops) - 2)
    colours = torch.lerp(stops[lower], stops[lower + 1], (position - lower)[..., None])
    return colours.permute(0, 3, 1, 2).round().byte()


def label_tiles(tiles: Tensor, texts: Sequence[str], colours: Sequence[tuple[int, int, int]]) -> Tensor:
    """[n, 3, h, w] -> [n, 3, h + 16, w] with a line of text below each tile"""
    font = ImageFont.load_default(size=12)
    strips = []
    for text, colour in zip(texts, colours, strict=True):
        strip = Image.new("RGB", (tiles.shape[-1], LABEL_HEIGHT), "white")
        ImageDraw.Draw(strip).text((1, 0), text, fill=colour, font=font)
        strips.append(pil_to_tensor(strip))
    return torch.cat([tiles, torch.stack(strips)], dim=2)


def resize_longest_side(image: Tensor, side: int) -> tuple[Tensor, float]:
    """[3, H, W] -> the image with a longer side of `side`, and the ratio of the sizes"""
    ratio = side / max(image.shape[-2:])
    size = [max(1, round(length * ratio)) for length in image.shape[-2:]]
    return F.interpolate(image[None].float(), size, mode="bilinear", antialias=True)[0].round().byte(), ratio


def draw_boxes(image: Tensor, boxes: Tensor, texts: Sequence[str], colours: Sequence[tuple[int, int, int]]) -> Tensor:
    """[3, H, W], [n, 4] -> the image with a frame around each box (left, top, right, bottom), its text above"""
    font = ImageFont.load_default(size=11)
    canvas = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    draw = ImageDraw.Draw(canvas)
    for box, text, colour in zip(boxes.tolist(), texts, colours, strict=True):
        draw.rectangle(box, outline=colour, width=2)
        corner = (box[0] + 2, max(0, box[1] - 6))
        draw.rectangle(draw.textbbox(corner, text, font=font), fill=colour)
        draw.text(corner, text, fill="white", font=font)
    return pil_to_tensor(canvas)


def _on_grid(values: Tensor, grid: PatchGrid) -> Tensor:
    """[n, N, c] -> [n, c, t, h, w]"""
    return values.unflatten(1, (grid.t, grid.h, grid.w)).movedim(-1, 1)
