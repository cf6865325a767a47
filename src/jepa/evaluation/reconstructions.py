"""Pictures of what an objective predicts in pixel space: reconstructions, masked inputs, samples, interpolations."""

from __future__ import annotations

from torch import Tensor

from jepa.evaluation.pictures import enlarge, frame_tiles, montage, rows_of_tiles
from jepa.evaluation.types import Evaluation, Picture, Snapshot

COMPARED = ("masked", "reconstruction")
"""Reconstructions with one clip per sample, shown below it."""
CONTINUED = "imagined"
"""Clips that begin as the samples do and go on otherwise, shown below them."""
CAPTIONS = {
    "reconstruction": "Samples that were not trained on, with their reconstructions below",
    "imagined": "Clips that were not trained on; below, what is imagined after their first two frames (one of two)",
    "samples": "Decoded from random latents",
    "interpolations": "Decoded from latents interpolated between two samples",
}
IMAGES_PER_ROW = 8


class Reconstructions:
    """Reports nothing if the objective predicts latents."""

    judges = "features"

    def __call__(self, snapshot: Snapshot) -> Evaluation:
        names = [name for name in COMPARED if name in snapshot.reconstructions]
        pictures = []
        if names:
            clips = [snapshot.pictures, *(snapshot.reconstructions[name] for name in names)]
            middle = ", and the masked input in between" if len(names) > 1 else ""
            pictures.append(_picture("reconstruction", *clips, addition=middle))
        for name, clips in snapshot.reconstructions.items():
            if name not in COMPARED:
                pictures.append(_picture(name, *([snapshot.pictures] if name == CONTINUED else []), clips))
        return Evaluation(pictures=tuple(pictures))


def _picture(name: str, *columns: Tensor, addition: str = "") -> Picture:
    """Several [n, C, T, H, W] of the same samples, one below the other"""
    rows = rows_of_tiles(*(enlarge(frame_tiles(clips)) for clips in columns), per_row=IMAGES_PER_ROW)
    return Picture(name, montage(rows), f"{CAPTIONS[name]}{addition}.")
