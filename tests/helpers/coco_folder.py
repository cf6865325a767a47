"""Folders in the layout of COCO."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from voc_folder import HEIGHT, WIDTH, picture

from jepa.data.boxes import COCO

CATEGORIES = [{"id": 5, "name": "owl"}, {"id": 3, "name": "cat"}]
IMAGES = [{"id": n, "file_name": f"{n}.png", "height": HEIGHT, "width": WIDTH} for n in (7, 9)]
GOOD_BOX = {"id": 1, "image_id": 7, "category_id": 3, "bbox": [1, 2, 3, 4]}


def write_coco(root: Path, boxes: Any, categories: Any = CATEGORIES, images: Any = IMAGES) -> Path:
    (root / "pictures").mkdir(parents=True, exist_ok=True)
    for entry in IMAGES:
        (root / "pictures" / entry["file_name"]).write_bytes(picture())
    (root / "all.json").write_text(json.dumps({"images": images, "annotations": boxes, "categories": categories}))
    return root


def coco(root: Path, **changes) -> COCO:
    return COCO(
        **({"root_path": str(root), "annotations": "all.json", "images": "pictures", "val_annotations": None} | changes)
    )
