"""inspect.html: features, attention and errors of an encoder on a data set; one file without external resources."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from markupsafe import Markup
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from jepa.benchmark.inspect import Observed, Subject, hardest, most_ambiguous, observe, one_per_label_in_turn
from jepa.benchmark.report import MAX_CONFUSION_CLASSES, bar, draw_confusion
from jepa.evaluation.pictures import (
    enlarge,
    frame_indices,
    frame_tiles,
    heatmap,
    montage,
    principal_colours,
    resize_nearest,
    to_rgb,
)
from jepa.evaluation.probe import nearest
from jepa.reports.charts import WIDTH, linear_scale, mark_class, mark_styles, scatter
from jepa.reports.page import Table, data_url, image, principal_plane, render
from jepa.runs.metrics import write_atomically
from jepa.types import PatchGrid

NUM_PICTURES, NUM_CLIPS = 12, 4
"""Number of pictures or clips with feature maps and attention."""
NUM_QUERIES, NUM_NEIGHBOURS = 12, 5
NUM_MISTAKES = 12
NUM_CONFUSIONS = 8
MAX_DOTS = 1000
THUMBNAIL_SIDE = 24
"""Side of a thumbnail in a plane of WIDTH, in pixels."""
MAX_BARS, BEST_BARS = 30, 10
MATRIX_SIDE = 480
"""Least side of a confusion matrix that is drawn as a picture, in pixels."""
FRAME_COLOUR = (255, 60, 40)
MAX_PICTURE_SIDE = 128
"""Longer side of a picture on the page, in pixels."""
PHOTO_BYTES = 12_000
"""Size of a PNG in bytes above which the picture is stored as JPEG."""


class Tile(NamedTuple):
    """A picture with lines of text under it."""

    source: str
    """data URL"""
    texts: Sequence[str]
    tone: str = ""
    """CSS class"""


@dataclass(frozen=True, kw_only=True)
class PageSection:
    """An introduction, and the pictures, tables and plots under it; if there are none, `lead` is the reason."""

    lead: str
    rows: Sequence[Sequence[Tile]] = ()
    has_strips: bool = False
    """Whether rows are frames side by side, with the maps of a clip under them instead of beside them."""
    tiles: Sequence[Tile] = ()
    cards: Sequence[Markup] = ()
    """Tables and plots side by side."""


def write_page(folder: Path, subject: Subject) -> Path:
    """Write FOLDER/inspect.html; readers see the old page or the new one."""
    num = NUM_CLIPS if subject.pictures.shape[2] > 1 else NUM_PICTURES
    observed = observe(subject.encoder, subject.pictures[:num])
    neighbours, similarity = nearest(subject.test.vectors, subject.train.vectors, NUM_NEIGHBOURS)
    sections = {
        "Feature maps": feature_maps(subject, observed), "Attention": attention_maps(subject, observed),
        "Nearest neighbours": neighbour_rows(subject, neighbours, similarity), "Embedding": embedding(subject),
        "Classes": class_bars(subject), "Confusion matrix": confusion_matrix(subject),
        "Hardest pictures": hardest_pictures(subject), "Most ambiguous pictures": ambiguous_pictures(subject),
    }  # fmt: skip
    target = Path(folder) / "inspect.html"
    facts = _facts(subject, observed, neighbours)
    text = render("inspect.html", name=subject.title, facts=facts, protocol=subject.protocol, sections=sections)
    write_atomically(target, text)
    return target


def _facts(subject: Subject, observed: Observed, neighbours: Tensor) -> dict[str, str]:
    encoder: Any = subject.encoder
    grid = observed.grid
    parameters = sum(weight.numel() for weight in encoder.parameters())
    same_class = subject.train.labels[neighbours] == subject.test.labels[:, None]
    return {
        "data": subject.data, "encoder": type(encoder).__name__,
        "width, depth": f"{encoder.embed_dim}, {len(getattr(encoder, 'blocks', ())) or 'unknown'}",
        "parameters": f"{parameters / 1e6:.3g} million", "patches": f"{grid.t}x" * (grid.t > 1) + f"{grid.h}x{grid.w}",
        "training samples": f"{len(subject.train.labels):,}", "test samples": f"{len(subject.test.labels):,}",
        "neighbours of the same class": f"{float(same_class.float().mean()):.1%}",
        "linear probe, top-1": f"{subject.confusion.trace() / subject.confusion.sum():.1%}",
    }  # fmt: skip


def feature_maps(subject: Subject, observed: Observed) -> PageSection:
    if not observed.tokens.isfinite().all():
        return PageSection(lead="The features are not finite.")
    colours, shares = principal_colours(observed.tokens, observed.grid)  # [P, 3, t, h, w]
    lead = (
        "Each patch in the colour of its features: their first three principal components over all these pictures are "
        f"red, green and blue ({', '.join(f'{share:.0%}' for share in shares)} of the variance). Patches of one colour "
        "have similar features."
    )
    return _with_pictures(subject, lead, [[("features", enlarge(maps.transpose(0, 1)))] for maps in colours])


def attention_maps(subject: Subject, observed: Observed) -> PageSection:
    attention, grid = observed.attention, observed.grid
    if isinstance(attention, str):
        return PageSection(lead=attention)
    lead = (
        "Attention of the last block, mean over its heads. Colours run from dark (none) to bright (the maximum of the "
        "map); the number is the attention to the brightest patch as a multiple of the mean. First the attention that "
        f"patches receive from each other{', then that of the class token' * (attention.class_token is not None)}, "
        "then that of the patch framed in red."
    )
    rows = []
    for index, query_maps in enumerate(attention.attention_of_queries):
        maps = [("received", attention.received[index], None)]
        if attention.class_token is not None:
            maps.append(("class token", attention.class_token[index], None))
        maps += [("query", values, query) for values, query in zip(query_maps, observed.queries, strict=True)]
        rows.append([_heat_map(name, values, grid, query) for name, values, query in maps])
    return _with_pictures(subject, lead, rows)


def _heat_map(name: str, values: Tensor, grid: PatchGrid, query: int | None) -> tuple[str, Tensor]:
    """[t, h, w] -> the name with the peak as a multiple of the mean, uint8 [t, 3, H, W] with the query framed."""
    title = f"{name} {float(values.max() / values.mean().clamp_min(1e-12)):.1f}x"
    frames = enlarge(heatmap(values / values.max().clamp_min(1e-12)))
    if query is None:
        return title, frames
    side = frames.shape[-1] // grid.w
    edge = max(2, side // 8)
    step, top, left = query // (grid.h * grid.w), query // grid.w % grid.h * side, query % grid.w * side
    patch = frames[step, :, top : top + side, left : left + side]
    inside = patch[:, edge:-edge, edge:-edge].clone()
    patch[:] = torch.tensor(FRAME_COLOUR, dtype=torch.uint8)[:, None, None]
    patch[:, edge:-edge, edge:-edge] = inside
    return title, frames


def _with_pictures(subject: Subject, lead: str, rows: Sequence[Sequence[tuple[str, Tensor]]]) -> PageSection:
    """A row for each of the first pictures: the picture, then its named maps uint8 [t, 3, H, W]."""
    cards = []
    for picture, label, maps in zip(subject.pictures, subject.test.labels.tolist(), rows, strict=False):
        name = subject.classes[label]
        if picture.shape[1] == 1:
            cards.append(
                [picture_tile(small(picture[:, 0]), name), *(picture_tile(values[0], text) for text, values in maps)]
            )
            continue
        frames = enlarge(torch.stack([small(frame) for frame in frame_tiles(picture)]))
        steps = [frame * len(maps[0][1]) // picture.shape[1] for frame in frame_indices(picture.shape[1])]
        strips = [(text, resize_nearest(values[steps], frames.shape[-2:])) for text, values in maps]
        pictures = [(montage([images]).permute(2, 0, 1), text) for text, images in [(name, frames), *strips]]
        cards.append([picture_tile(picture, text) for picture, text in pictures])
    return PageSection(lead=lead, rows=cards, has_strips=subject.pictures.shape[2] > 1)


def neighbour_rows(subject: Subject, neighbours: Tensor, similarity: Tensor) -> PageSection:
    lead = (
        "Each row starts with a test picture, followed by the training pictures with the most similar features "
        "(cosine), best first. Green ones are of its class, red ones of another."
    )
    rows = []
    for query in one_per_label_in_turn(subject.test.labels, NUM_QUERIES):
        label = int(subject.test.labels[query])
        tiles = [picture_tile(small(subject.test_thumbnails[query]), subject.classes[label])]
        for index, cosine in zip(neighbours[query].tolist(), similarity[query].tolist(), strict=True):
            other = int(subject.train.labels[index])
            text, tone = f"{subject.classes[other]} {cosine:.3f}", "good" if other == label else "bad"
            tiles.append(picture_tile(small(subject.train_thumbnails[index]), text, tone=tone))
        rows.append(tiles)
    return PageSection(lead=lead, rows=rows)


def embedding(subject: Subject) -> PageSection:
    """A scatter plot of the test samples, and beside it thumbnails at their positions."""
    num = len(subject.test.labels)
    rows = torch.linspace(0, num - 1, min(num, MAX_DOTS)).round().long()
    vectors = subject.test.vectors[rows]
    if len(vectors) < 3 or not vectors.isfinite().all():
        return PageSection(lead="There are fewer than three test samples, or their features are not finite.")
    plane, shares = principal_plane(vectors.numpy())
    points = [(x, y) for x, y in plane.tolist()]
    names = [subject.classes[label] for label in subject.test.labels[rows].tolist()]
    lead = (
        f"The features of {len(rows):,} test samples on their two main directions ({shares[0]:.0%} and {shares[1]:.0%} "
        "of the variance); labels under the pointer. Samples that are close here may differ in other directions."
    )
    thumbnails = _thumbnails_in_plane(subject.test_thumbnails[rows], points, names)
    card = Markup('<div class="card plane">{}</div>')
    return PageSection(lead=lead, cards=[card.format(scatter(points, names)), card.format(thumbnails)])


def _thumbnails_in_plane(thumbnails: Tensor, points: Sequence[tuple[float, float]], names: Sequence[str]) -> Markup:
    """An SVG of the thumbnails that do not overlap, framed in the colour of their class."""
    styles = mark_styles(names)
    end = WIDTH - THUMBNAIL_SIDE
    x, y = (linear_scale(values, 0, end) for values in zip(*points, strict=True))
    pictures: list[tuple[float, float, str, str, str]] = []
    for picture, point, name in zip(thumbnails, points, names, strict=True):
        left, top = x(point[0]), end - y(point[1])
        if all(max(abs(left - a), abs(top - b)) > THUMBNAIL_SIDE + 2 for a, b, *_ in pictures):
            pictures.append((left, top, name, _encode(small(picture)), mark_class(styles[name])))
    return render("thumbnails.html", side=WIDTH + 4, size=THUMBNAIL_SIDE, pictures=pictures)


def class_bars(subject: Subject) -> PageSection:
    """Recall of each class, the worst first."""
    totals = subject.confusion.sum(dim=1)
    recalls = subject.confusion.diag() / totals.clamp_min(1)
    order = [index for index in recalls.argsort(stable=True).tolist() if totals[index]]
    lead = f"Share of the test samples of a class that the linear probe predicts correctly, of {len(order)} classes"
    if len(order) > MAX_BARS:
        order = [*order[: MAX_BARS - BEST_BARS], *order[-BEST_BARS:]]
        lead += f" the worst {MAX_BARS - BEST_BARS} and the best {BEST_BARS}"
    rows = [
        [subject.classes[index], bar(100 * recall, f"{recall:.0%}"), f"{int(totals[index]):,}"]
        for index, recall in ((index, float(recalls[index])) for index in order)
    ]
    table = Table(heads=["", "recall", "test samples"], rows=rows, text_columns={1})
    return PageSection(lead=f"{lead}.", cards=[table.html("recalls")])


def confusion_matrix(subject: Subject) -> PageSection:
    counts = subject.confusion
    lead = "Predictions of the linear probe: a row for each true class, a column for each predicted class."
    if len(counts) <= MAX_CONFUSION_CLASSES:
        matrix = draw_confusion(counts.tolist(), subject.classes)
    else:
        shares = counts / counts.sum(dim=1, keepdim=True).clamp_min(1)
        matrix = image(_encode(enlarge(heatmap(shares[None]), MATRIX_SIDE)[0]), "confusion matrix")
        lead += " The colour is the share of the true class, from dark (none) to bright (all)."
    card = Markup('<div class="card scroll">{}</div>').format(matrix)
    return PageSection(lead=lead, cards=[card, _most_frequent_confusions(subject, counts)])


def _most_frequent_confusions(subject: Subject, counts: Tensor) -> Markup:
    wrong = counts - counts.diag().diag()
    rows = []
    for index in wrong.flatten().argsort(descending=True, stable=True)[:NUM_CONFUSIONS].tolist():
        label, predicted = divmod(index, len(counts))
        if times := int(wrong[label, predicted]):
            share = times / int(counts[label].sum())
            rows.append([subject.classes[label], subject.classes[predicted], f"{times:,}", f"{share:.0%}"])
    if not rows:
        return Markup('<div class="card"><p class="empty">The probe makes no mistake.</p></div>')
    heads = ["true class", "predicted class", "times", "of the class"]
    return Table(heads=heads, rows=rows, text_columns={1}).html()


def hardest_pictures(subject: Subject) -> PageSection:
    """The wrong predictions with the highest confidence."""
    rows = hardest(subject.probabilities, subject.test.labels, NUM_MISTAKES)
    if not len(rows):
        return PageSection(lead="The probe makes no mistake.")
    lead = "The wrong predictions of which the linear probe is most confident: its prediction, then the label."
    return PageSection(lead=lead, tiles=_prediction_tiles(subject, rows, num_classes=1, tone="bad"))


def ambiguous_pictures(subject: Subject) -> PageSection:
    """The samples whose two likeliest classes have nearly equal probabilities."""
    rows = most_ambiguous(subject.probabilities, NUM_MISTAKES)
    lead = "The pictures whose two likeliest classes are nearly equally likely to the linear probe."
    return PageSection(lead=lead, tiles=_prediction_tiles(subject, rows, num_classes=2))


def _prediction_tiles(subject: Subject, rows: Tensor, *, num_classes: int, tone: str = "") -> list[Tile]:
    """Test pictures with their likeliest classes and the label."""
    tiles = []
    for row in rows.tolist():
        best = subject.probabilities[row].topk(num_classes)
        answers = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        texts = [f"{subject.classes[index]} {probability:.0%}" for index, probability in answers]
        texts.append(f"is {subject.classes[int(subject.test.labels[row])]}")
        tiles.append(picture_tile(small(subject.test_thumbnails[row]), *texts, tone=tone))
    return tiles


def picture_tile(pixels: Tensor, *texts: str, tone: str = "") -> Tile:
    """uint8 [3, h, w] -> a picture with these lines of text"""
    return Tile(_encode(pixels), texts, tone)


def _encode(pixels: Tensor) -> str:
    """uint8 [3, h, w] -> data URL"""
    picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    for kind in ("png", "jpeg"):
        file = BytesIO()
        picture.save(file, kind)
        if file.tell() < PHOTO_BYTES:
            break
    return data_url(file.getvalue(), kind)


def small(picture: Tensor) -> Tensor:
    """uint8 [C, h, w] -> uint8 [3, h, w] with the longer side at most MAX_PICTURE_SIDE"""
    rgb = to_rgb(picture[None])
    scale = MAX_PICTURE_SIDE / max(rgb.shape[-2:])
    if scale >= 1:
        return rgb[0]
    height, width = (max(1, round(side * scale)) for side in rgb.shape[-2:])
    return F.adaptive_avg_pool2d(rgb.float(), (height, width))[0].round().byte()
