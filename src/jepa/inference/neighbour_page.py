"""A page with a picture and the files that are nearest to it, with thumbnails."""

from __future__ import annotations

from pathlib import Path

from jepa.benchmark.inspect_page import PageSection, Tile, picture_tile, small
from jepa.data.loader import UNREADABLE
from jepa.inference.embed import Neighbours
from jepa.inference.files import all_files, is_video_file
from jepa.reports.page import render
from jepa.runs.metrics import write_atomically


def write_neighbour_page(target: Path, picture: str, found: Neighbours) -> None:
    """Write the page; a file that is not there any more is shown by its name."""
    tiles = [_tile(found, picture, Path(picture).name)]
    for name, cosine in zip(found.names, found.cosines, strict=True):
        path = Path(name)
        tiles.append(_tile(found, str(Path(found.folder) / path), path.name, f"{cosine:.3f}", str(path.parent)))
    lead = f"The picture, then the files in {found.folder} with the most similar features (cosine), best first."
    section = PageSection(lead=lead, rows=[tiles])
    text = render("inspect.html", name=Path(picture).name, facts={}, protocol=(), sections={"Neighbours": section})
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, text)


def _tile(found: Neighbours, path: str, *texts: str) -> Tile:
    try:
        clip = all_files(path, is_video=is_video_file(path), clip_shape=found.clip_shape, settings={})[0][0]
    except (ValueError, *UNREADABLE):
        return Tile("data:,", texts)
    return picture_tile(small(clip[:, clip.shape[1] // 2]), *texts)
