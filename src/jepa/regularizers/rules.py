"""Rules of the regularisers, named by their classes: the views or time steps that they compare. Without torch."""

from __future__ import annotations

from collections.abc import Iterator

from jepa.config.view import ConfigView


def cross_view(checked: ConfigView, path: str) -> Iterator[str]:
    if checked.get(f"{path}.between", "crops") == "frames":
        yield from temporal_similarity(checked, path)
    else:
        yield from _crops(checked, f"{path}.between")


def temporal_similarity(checked: ConfigView, path: str) -> Iterator[str]:
    if checked["num_frames"] < 2:
        yield f"{checked.show(path)} with {checked.show('num_frames')}: compares the time steps of a clip"


def vicreg(checked: ConfigView, path: str) -> Iterator[str]:
    if checked.get(f"{path}.invariance", 0) > 0:
        yield from _crops(checked, f"{path}.invariance")


def _crops(checked: ConfigView, key: str) -> Iterator[str]:
    if checked["augment.views"] + checked.get("augment.local_views", 0) < 2:
        both = f"{checked.show(key)} with {checked.show('augment.views')}"
        yield f"{both}: compares crops of a sample; set augment.views=2"
