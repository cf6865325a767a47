"""Rules of the regularisers, named by their classes: the views or time steps that they compare. Without torch."""

from __future__ import annotations

from collections.abc import Iterator

from jepa.config.view import ConfigView


def cross_view(view: ConfigView, path: str) -> Iterator[str]:
    if view.get(f"{path}.between", "crops") == "frames":
        yield from temporal_similarity(view, path)
    else:
        yield from _crops(view, f"{path}.between")


def temporal_similarity(view: ConfigView, path: str) -> Iterator[str]:
    if view["num_frames"] < 2:
        yield f"{view.describe(path)} with {view.describe('num_frames')}: compares the time steps of a clip"


def vicreg(view: ConfigView, path: str) -> Iterator[str]:
    if view.get(f"{path}.invariance", 0) > 0:
        yield from _crops(view, f"{path}.invariance")


def _crops(view: ConfigView, key: str) -> Iterator[str]:
    if view["augment.views"] + view.get("augment.local_views", 0) < 2:
        both = f"{view.describe(key)} with {view.describe('augment.views')}"
        yield f"{both}: compares crops of a sample; set augment.views=2"
