"""The HTML page that reports share."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np


def page(title: str, parts: Sequence[str]) -> str:
    """A whole HTML file in the style of the report; empty parts are left out."""
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style></head>\n"
        f"<body><main>\n{''.join(part + chr(10) for part in parts if part)}</main></body></html>\n"
    )


def principal_plane(vectors: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """[n, D] -> [n, 2], the two main directions, and their shares of the variance."""
    centred = vectors.astype(np.float64) - vectors.mean(axis=0, dtype=np.float64)
    left, singular, _ = np.linalg.svd(centred, full_matrices=False)
    total = max(float((singular**2).sum()), 1e-30)
    plane = np.pad(left[:, :2] * singular[:2], ((0, 0), (0, max(0, 2 - len(singular)))))
    return plane, [float(s**2) / total for s in [*singular[:2], 0.0][:2]]
