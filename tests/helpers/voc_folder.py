"""Folders in the layout of Pascal VOC."""

from __future__ import annotations

from pathlib import Path

import torch
from torchvision.io import encode_png

from jepa.data.boxes import VOC

HEIGHT, WIDTH = 40, 60


def picture(height: int = HEIGHT, width: int = WIDTH) -> bytes:
    return encode_png(torch.full((3, height, width), 90, dtype=torch.uint8)).numpy().tobytes()


def xml(*boxes: tuple, size: tuple[int, int] | None = (HEIGHT, WIDTH), extra: str = "") -> str:
    objects = "".join(
        f"<object><name>{name}</name>{extra}<bndbox><xmin>{left}</xmin><ymin>{top}</ymin><xmax>{right}</xmax>"
        f"<ymax>{bottom}</ymax></bndbox></object>"
        for name, left, top, right, bottom in boxes
    )
    size_tag = f"<size><width>{size[1]}</width><height>{size[0]}</height></size>" if size else ""
    return f"<annotation>{size_tag}{objects}</annotation>"


def write_voc(root: Path, images: dict[str, str], splits: dict[str, list[str]]) -> Path:
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for name, text in images.items():
        (root / "Annotations" / f"{name}.xml").write_text(text)
        (root / "JPEGImages" / f"{name}.png").write_bytes(picture())
    for name, members in splits.items():
        (root / "ImageSets" / "Main" / f"{name}.txt").write_text("".join(f"{member}  1\n" for member in members))
    return root


def voc(root: Path, **changes) -> VOC:
    return VOC(**({"root_path": str(root), "split": "train", "val_split": "val"} | changes))
