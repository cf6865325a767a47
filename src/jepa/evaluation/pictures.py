"""Small pictures out of tensors: tiles in rows, tinted patches, false colours. Everything is uint8 RGB on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from jepa.types import PatchGrid

GAP = 4
"""white pixels around a tile"""
TILE = 96
"""least side of a readable tile"""
LABEL_HEIGHT = 16
MAX_FRAMES = 8
BLOCK_COLOURS = ((230, 60, 50), (40, 120, 230), (30, 170, 90), (240, 160, 20), (150, 70, 200), (20, 180, 190))
HEAT = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
"""dark to bright, near the viridis map"""


def to_rgb(images: Tensor) -> Tensor:
    """[n, C, h, w] -> [n, 3, h, w]: the first three channels, grey when there is one, no blue when there are two."""
    if images.shape[1] == 1:
        return images.expand(-1, 3, -1, -1)
    return F.pad(images, (0, 0, 0, 0, 0, max(0, 3 - images.shape[1])))[:, :3]


def enlarge(images: Tensor, side: int = TILE) -> Tensor:
    """[n, 3, h, w] -> [n, 3, f*h, f*w]: each pixel f times, so that the shorter side reaches `side`."""
    factor = max(1, -(-side // min(images.shape[-2:])))
    return images.repeat_interleave(factor, -2).repeat_interleave(factor, -1)


def fit(images: Tensor, size: Sequence[int]) -> Tensor:
    """[n, 3, h, w] -> [n, 3, *size], pixels repeated."""
    return F.interpolate(images, tuple(size), mode="nearest")


def montage(rows: Sequence[Tensor]) -> Tensor:
    """Rows of tiles [n, 3, h, w], n and h may differ from row to row -> [H, W, 3] on white."""
    strips = []
    width = max(len(row) * (row.shape[-1] + GAP) + GAP for row in rows)
    for row in rows:
        framed = F.pad(row, (GAP, 0, GAP, 0), value=255)  # [n, 3, h + GAP, w + GAP]
        strip = framed.permute(2, 0, 3, 1).flatten(1, 2)  # [h + GAP, n * (w + GAP), 3]
        strips.append(F.pad(strip, (0, 0, 0, width - strip.shape[1]), value=255))
    return F.pad(torch.cat(strips), (0, 0, 0, 0, 0, GAP), value=255)


def interleave(*columns: Tensor, per_row: int = 4) -> list[Tensor]:
    """Several [n, 3, h, w] -> rows of `per_row` tiles, the rows of one set under those of the other."""
    return [part for parts in zip(*(c.split(per_row) for c in columns), strict=True) for part in parts]


def frames_shown(num_frames: int) -> list[int]:
    """At most MAX_FRAMES of a clip, evenly spaced."""
    num = min(num_frames, MAX_FRAMES)
    return [(2 * i + 1) * num_frames // (2 * num) for i in range(num)]


def film(clip: Tensor) -> Tensor:
    """[C, T, h, w] -> [F, 3, h, w]: the frames that are shown."""
    return to_rgb(clip[:, frames_shown(clip.shape[1])].transpose(0, 1))


def mask_overlay(images: Tensor, context: Tensor, targets: Tensor, grid: PatchGrid, step: int = 0) -> Tensor:
    """[n, 3, H, W], [n, K], [n, M, J]: context as it is, target blocks tinted, the rest dark, at a step of the grid."""
    num_images, num_tokens = len(images), grid.num_tokens
    brightness = torch.full((num_images, num_tokens), 0.2).scatter_(1, context, 1.0)
    tint = torch.zeros(num_images, num_tokens, 3)
    covered = torch.zeros(num_images, num_tokens)
    for block in range(targets.shape[1]):
        colour = torch.tensor(BLOCK_COLOURS[block % len(BLOCK_COLOURS)]).float()
        tint.scatter_(1, targets[:, block, :, None].expand(-1, -1, 3), colour.expand(num_images, targets.shape[2], 3))
        covered.scatter_(1, targets[:, block], 0.6)
        brightness.scatter_(1, targets[:, block], 0.4)
    size = images.shape[-2:]
    kept = fit(_on_grid(brightness[..., None], grid)[:, :, step], size)
    painted = fit(_on_grid(tint * covered[..., None], grid)[:, :, step], size)
    return (images * kept + painted).clamp(0, 255).byte()


def principal_colours(tokens: Tensor, grid: PatchGrid) -> tuple[Tensor, list[float]]:
    """[n, N, D] -> the three main directions of all tokens as colours [n, 3, t, h, w], their shares of the variance."""
    cloud = tokens.double().flatten(0, 1)
    cloud = cloud - cloud.mean(0)
    variances, directions = torch.linalg.eigh(cloud.T @ cloud)  # ascending
    directions = directions[:, -3:].flip(1)
    directions = directions * directions.gather(0, directions.abs().argmax(0, keepdim=True)).sign()
    values = F.pad(cloud @ directions, (0, 3 - directions.shape[1]))  # [n * N, 3]
    low, high = values.quantile(0.02, dim=0), values.quantile(0.98, dim=0)
    colours = ((values - low) / (high - low).clamp_min(1e-12) * 255).clamp(0, 255).round().byte()
    shares = variances.flip(0)[:3] / variances.sum().clamp_min(1e-12)
    return _on_grid(colours.unflatten(0, tokens.shape[:2]), grid), shares.tolist()


def heat(values: Tensor) -> Tensor:
    """[n, h, w] in [0, 1] -> [n, 3, h, w], dark to bright."""
    stops = torch.tensor(HEAT).float()
    place = values.clamp(0, 1) * (len(stops) - 1)
    lower = place.floor().long().clamp_max(len(stops) - 2)
    colours = torch.lerp(stops[lower], stops[lower + 1], (place - lower)[..., None])
    return colours.permute(0, 3, 1, 2).round().byte()


def labelled_tiles(tiles: Tensor, texts: Sequence[str], colours: Sequence[tuple[int, int, int]]) -> Tensor:
    """[n, 3, h, w] -> [n, 3, h + 16, w] with a line of text under each tile."""
    font = ImageFont.load_default(size=12)
    strips = []
    for text, colour in zip(texts, colours, strict=True):
        strip = Image.new("RGB", (tiles.shape[-1], LABEL_HEIGHT), "white")
        ImageDraw.Draw(strip).text((1, 0), text, fill=colour, font=font)
        strips.append(torch.frombuffer(bytearray(strip.tobytes()), dtype=torch.uint8).view(LABEL_HEIGHT, -1, 3))
    return torch.cat([tiles, torch.stack(strips).permute(0, 3, 1, 2)], dim=2)


def fit_inside(image: Tensor, side: int) -> tuple[Tensor, float]:
    """[3, H, W] -> the same with a longer side of `side`, and the ratio of the sizes."""
    ratio = side / max(image.shape[-2:])
    size = [max(1, round(length * ratio)) for length in image.shape[-2:]]
    return F.interpolate(image[None].float(), size, mode="bilinear", antialias=True)[0].round().byte(), ratio


def outlined(image: Tensor, boxes: Tensor, texts: Sequence[str], colours: Sequence[tuple[int, int, int]]) -> Tensor:
    """[3, H, W], [n, 4] -> the image with a frame around each box (left, top, right, bottom), its text above."""
    font = ImageFont.load_default(size=11)
    canvas = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    draw = ImageDraw.Draw(canvas)
    for box, text, colour in zip(boxes.tolist(), texts, colours, strict=True):
        draw.rectangle(box, outline=colour, width=2)
        place = (box[0] + 2, max(0, box[1] - 6))
        draw.rectangle(draw.textbbox(place, text, font=font), fill=colour)
        draw.text(place, text, fill="white", font=font)
    return torch.frombuffer(bytearray(canvas.tobytes()), dtype=torch.uint8).view(*image.shape[-2:], 3).permute(2, 0, 1)


def _on_grid(values: Tensor, grid: PatchGrid) -> Tensor:
    """[n, N, c] -> [n, c, t, h, w]"""
    return values.unflatten(1, (grid.t, grid.h, grid.w)).movedim(-1, 1)
