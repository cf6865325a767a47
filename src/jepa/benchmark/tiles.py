"""Pictures as tiles of an HTML page, and frames as strips."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from io import BytesIO

from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from jepa.evaluation.pictures import montage, to_rgb

SHOWN_SIDE = 128
"""pixels of a picture on the page, at most"""
PHOTO_BYTES = 12_000
"""what PNG makes larger than that is a photo"""


def line(tiles: Sequence[str]) -> str:
    return f'<div class="card tiles line">{"".join(tiles)}</div>'


def tile(pixels: Tensor, *texts: str, tone: str = "") -> str:
    """[3, h, w] with lines of text under it"""
    lines = "".join(f"<span>{escape(text)}</span>" for text in texts if text)
    return f'<figure class="{tone}">{image(pixels, texts[0])}<figcaption>{lines}</figcaption></figure>'


def strip(frames: Tensor, text: str) -> str:
    """[F, 3, h, w] side by side"""
    return f"<figure><figcaption>{escape(text)}</figcaption>{image(montage([frames]).permute(2, 0, 1), text)}</figure>"


def image(pixels: Tensor, text: str) -> str:
    return f'<img alt="{escape(text)}" src="{data_url(pixels)}">'


def data_url(pixels: Tensor) -> str:
    """uint8 [3, h, w]"""
    picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    for kind in ("png", "jpeg"):
        file = BytesIO()
        picture.save(file, kind)
        if file.tell() < PHOTO_BYTES:
            break
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def small(picture: Tensor) -> Tensor:
    """uint8 [C, h, w] -> [3, h, w], the longer side at most SHOWN_SIDE"""
    rgb = to_rgb(picture[None])
    share = SHOWN_SIDE / max(rgb.shape[-2:])
    if share >= 1:
        return rgb[0]
    height, width = (max(1, round(side * share)) for side in rgb.shape[-2:])
    return F.adaptive_avg_pool2d(rgb.float(), (height, width))[0].round().byte()
