"""What an objective of pixels predicts, as pictures: reconstructions, what masks left to see, samples."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from jepa.evaluation.pictures import enlarge, film, interleave, montage, to_rgb
from jepa.evaluation.types import Evaluation, Picture, Snapshot

COMPARED = ("masked", "reconstruction")
"""one for each sample, shown under it"""
CAPTIONS = {
    "reconstruction": "Samples that were not trained on, and under them what is rebuilt",
    "samples": "Decoded from random latents",
    "interpolations": "Decoded from latents on the way from one sample to another",
}
PER_ROW = 8
NUM_FILMS = 4


class Reconstructions:
    """Shows nothing where the objective predicts latents."""

    judges = "features"

    def __call__(self, snapshot: Snapshot) -> Evaluation:
        compared = [snapshot.reconstructions[name] for name in COMPARED if name in snapshot.reconstructions]
        pictures = []
        if compared:
            middle = "; between them, what the encoder saw" if len(compared) > 1 else ""
            caption = f"{CAPTIONS['reconstruction']}{middle}."
            pictures.append(Picture("reconstruction", montage(beside([snapshot.pictures, *compared])), caption))
        for name in [name for name in snapshot.reconstructions if name not in COMPARED]:
            pictures.append(Picture(name, montage(rows_of(snapshot.reconstructions[name])), f"{CAPTIONS[name]}."))
        return Evaluation(pictures=tuple(pictures))


def beside(columns: Sequence[Tensor]) -> list[Tensor]:
    """Several [n, C, T, H, W] of the same samples -> rows in which each is under the one before."""
    if columns[0].shape[2] == 1:
        return interleave(*(enlarge(to_rgb(clips[:, :, 0])) for clips in columns), per_row=PER_ROW)
    return [enlarge(film(clip)) for clips in zip(*columns, strict=True) for clip in clips][: NUM_FILMS * len(columns)]


def rows_of(clips: Tensor) -> list[Tensor]:
    """[n, C, T, H, W] -> rows of eight images, or a row of frames for each of the first clips"""
    if clips.shape[2] == 1:
        return list(enlarge(to_rgb(clips[:, :, 0])).split(PER_ROW))
    return [enlarge(film(clip)) for clip in clips[:NUM_FILMS]]
