"""Features with thumbnails for an embedding projector, and nearest neighbours of a few images."""

from __future__ import annotations

from jepa.evaluation.pictures import enlarge, label_tiles, montage, to_rgb
from jepa.evaluation.probe import nearest
from jepa.evaluation.types import EmbeddingTable, Evaluation, Picture, Snapshot
from jepa.types import PositiveInt

NUM_QUERIES = 8
NUM_NEIGHBOURS = 5
MAX_TEXT = 14
"""Characters of a class name below a thumbnail."""
BLACK, GREEN, RED = (0, 0, 0), (20, 130, 50), (190, 40, 30)


class Embeddings:
    """A table of the first `rows` validation samples and a picture of nearest neighbours among all of them."""

    judges = "features"

    def __init__(self, *, rows: PositiveInt) -> None:
        self.rows = rows
        self.protocol = f"embeddings: features of {rows} validation images; neighbours by cosine among all of them"

    def __call__(self, snapshot: Snapshot) -> Evaluation:
        vectors, labels = snapshot.val.vectors[: self.rows], snapshot.val.labels[: self.rows]
        names = [label_name(int(label), snapshot.classes) for label in labels]
        table = EmbeddingTable("embeddings", vectors, names, snapshot.thumbnails[: self.rows])
        has_neighbours = len(snapshot.pictures) > 0 and len(snapshot.val.vectors) > 1
        return Evaluation(pictures=(neighbour_picture(snapshot),) if has_neighbours else (), tables=(table,))


def label_name(label: int, classes: tuple[str, ...]) -> str:
    if label < 0:
        return ""
    return classes[label] if label < len(classes) else str(label)


def neighbour_picture(snapshot: Snapshot) -> Picture:
    """A row for each query: the image, then its neighbours, with class names below them."""
    vectors, thumbnails = snapshot.val.vectors, to_rgb(snapshot.thumbnails)
    count = min(NUM_NEIGHBOURS, len(vectors) - 1)
    neighbours, _ = nearest(vectors[:NUM_QUERIES], vectors, count, exclude_self=True)
    rows = []
    for query, indices in enumerate(neighbours.tolist()):
        labels = snapshot.val.labels[[query, *indices]].tolist()
        texts = [label_name(label, snapshot.classes)[:MAX_TEXT] for label in labels]
        colours = [BLACK, *(GREEN if label == labels[0] else RED for label in labels[1:])]
        rows.append(label_tiles(enlarge(thumbnails[[query, *indices]]), texts, colours))
    caption = (
        "Nearest neighbours: each row begins with a validation image, then the images whose features are most similar "
        "(cosine), best first; green names are of its class, red ones of another."
    )
    return Picture("neighbours", montage(rows), caption)
