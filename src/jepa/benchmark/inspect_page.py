"""inspect.html: what an encoder makes of a data set, in one file that needs no service, script or network."""

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

from jepa.benchmark.inspect import (
    Observed,
    Subject,
    agreement,
    hardest,
    most_ambiguous,
    observe,
    one_per_label_in_turn,
)
from jepa.evaluation.embeddings import label_name
from jepa.evaluation.pictures import enlarge, film, fit, frames_shown, heat, montage, principal_colours, to_rgb
from jepa.evaluation.probe import confusion_counts, nearest
from jepa.reports.charts import WIDTH, Scale, mark_class, mark_styles, scatter
from jepa.reports.page import Table, data_url, image, principal_plane, render
from jepa.runs.metrics import write_atomically
from jepa.types import PatchGrid

NUM_PICTURES, NUM_CLIPS = 12, 4
"""that feature maps and attention are shown of"""
NUM_QUERIES, NUM_NEIGHBOURS = 12, 5
NUM_MISTAKES = 12
NUM_CONFUSIONS = 8
MAX_DOTS = 1000
PLACED = 24
"""width of a thumbnail in a plane of WIDTH"""
MAX_BARS, BEST_BARS = 30, 10
MAX_CELLS = 30
"""classes of a confusion matrix whose cells are drawn with their names"""
CELL, MAX_NAME, MATRIX_SIDE = 34, 14, 480
FRAME_COLOUR = (255, 60, 40)
SHOWN_SIDE = 128
"""pixels of a picture on the page, at most"""
PHOTO_BYTES = 12_000
"""A picture whose PNG is larger than this many bytes is taken for a photo, and stored as JPEG."""
WITHOUT_PROBE = "Left out: it needs the answers of a linear probe, and labels in both parts of the data set."


Thumbnail = tuple[float, float, str, str, str]
"""left and top in pixels, class name, style, data URL"""


class Tile(NamedTuple):
    """A picture with lines of text under it."""

    source: str
    """data URL"""
    texts: Sequence[str]
    tone: str = ""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A sentence, and under it whatever of the rest is not empty."""

    lead: str
    is_left_out: bool = False
    """`lead` is the reason."""
    rows: Sequence[Sequence[Tile]] = ()
    has_strips: bool = False
    """The rows are of frames side by side, and their maps stand under them, not beside them."""
    tiles: Sequence[Tile] = ()
    plane: Markup | None = None
    thumbnails: Sequence[Thumbnail] = ()
    bars: Sequence[tuple[str, float, str]] = ()
    """Name, share from 0 to 1 and number of samples of each class."""
    matrix: Markup | None = None
    confusions: Table | None = None


def write_page(folder: Path, subject: Subject) -> Path:
    """Write FOLDER/inspect.html; readers see the old page or the new one."""
    num = NUM_CLIPS if subject.pictures.shape[2] > 1 else NUM_PICTURES
    observed = observe(subject.encoder, subject.pictures[:num])
    found, similarity = nearest(subject.test.vectors, subject.train.vectors, NUM_NEIGHBOURS)
    sections = {
        "Feature maps": feature_maps(subject, observed),
        "Attention": attention_maps(subject, observed),
        "Nearest neighbours": neighbour_rows(subject, found, similarity),
        "Embedding": embedding(subject),
        "Classes": class_bars(subject),
        "Confusion matrix": confusion_matrix(subject),
        "Hardest pictures": hardest_pictures(subject),
        "Most ambiguous pictures": ambiguous_pictures(subject),
    }
    target = Path(folder) / "inspect.html"
    text = render(
        "inspect.html", name=subject.title, facts=_facts(subject, observed, found), protocol=subject.protocol,
        sections=sections, plane_width=WIDTH, placed_width=PLACED,
    )  # fmt: skip
    write_atomically(target, text)
    return target


def _facts(subject: Subject, observed: Observed, found: Tensor) -> dict[str, str]:
    encoder: Any = subject.encoder
    grid = observed.grid
    size = "x".join(str(side) for side in ((grid.t,) if grid.t > 1 else ()) + (grid.h, grid.w))
    parameters = sum(weight.numel() for weight in encoder.parameters())
    facts = {
        "encoder": type(encoder).__name__,
        "width, depth": f"{encoder.embed_dim}, {len(getattr(encoder, 'blocks', ())) or 'unknown'}",
        "parameters": f"{parameters / 1e6:.3g} million",
        "patches": size,
        "training samples": f"{len(subject.train.labels):,}",
        "test samples": f"{len(subject.test.labels):,}",
        **subject.facts,
    }
    if subject.is_labelled:
        share = agreement(found, subject.train.labels, subject.test.labels)
        facts["neighbours of the same class"] = f"{share:.1%}"
        if subject.probabilities is not None:
            counts = _counts(subject, subject.probabilities)
            facts["linear probe, top-1"] = f"{counts.trace() / counts.sum():.1%}"
    return facts


def feature_maps(subject: Subject, observed: Observed) -> Section:
    if not observed.tokens.isfinite().all():
        return _left_out("The features are not finite.")
    colours, shares = principal_colours(observed.tokens, observed.grid)  # [P, 3, t, h, w]
    share = ", ".join(f"{share:.0%}" for share in shares)
    lead = (
        "Each patch in the colour of its features: their three main directions over all these pictures are red, green "
        f"and blue ({share} of the variance). Parts of one colour are alike to the encoder."
    )
    shown = [[("features", enlarge(maps.transpose(0, 1)))] for maps in colours]
    return _beside_pictures(subject, lead, shown)


def attention_maps(subject: Subject, observed: Observed) -> Section:
    attention, grid = observed.attention, observed.grid
    if isinstance(attention, str):
        return _left_out(attention)
    lead = (
        "Of the last block, mean over its heads. Dark is nothing and bright the most in that map; the number says how "
        "many times its even share the brightest patch has. First what the patches receive from each other"
        f"{', then what the class token looks at' if attention.class_token is not None else ''}, then what the patch "
        "framed in red looks at."
    )
    rows = []
    for index, looks in enumerate(attention.attention_of_queries):
        maps = [("received", attention.received[index], None)]
        if attention.class_token is not None:
            maps.append(("class token", attention.class_token[index], None))
        maps += [("looks", look, query) for look, query in zip(looks, observed.queries, strict=True)]
        rows.append([(f"{name} {_peak(values):.1f}x", _heat_map(values, grid, query)) for name, values, query in maps])
    return _beside_pictures(subject, lead, rows)


def _peak(values: Tensor) -> float:
    """The largest value as a multiple of the mean."""
    return float(values.max() / values.mean().clamp_min(1e-12))


def _heat_map(values: Tensor, grid: PatchGrid, query: int | None) -> Tensor:
    """[t, h, w] -> uint8 [t, 3, H, W], a frame around the query patch"""
    drawn = enlarge(heat(values / values.max().clamp_min(1e-12)))
    if query is None:
        return drawn
    side = drawn.shape[-1] // grid.w
    edge = max(2, side // 8)
    step, top, left = query // (grid.h * grid.w), query // grid.w % grid.h * side, query % grid.w * side
    patch = drawn[step, :, top : top + side, left : left + side]
    inside = patch[:, edge:-edge, edge:-edge].clone()
    patch[:] = torch.tensor(FRAME_COLOUR, dtype=torch.uint8)[:, None, None]
    patch[:, edge:-edge, edge:-edge] = inside
    return drawn


def _beside_pictures(subject: Subject, lead: str, rows: Sequence[Sequence[tuple[str, Tensor]]]) -> Section:
    """Names and maps uint8 [t, 3, H, W] of each of the first pictures: tiles beside it, of a clip strips under it."""
    cards = []
    for index, maps in enumerate(rows):
        picture, name = subject.pictures[index], _name(subject, int(subject.test.labels[index]))
        if picture.shape[1] == 1:
            cards.append([_tile(small(picture[:, 0]), name), *(_tile(shown[0], text) for text, shown in maps)])
            continue
        frames = enlarge(torch.stack([small(frame) for frame in film(picture)]))
        steps = [frame * len(maps[0][1]) // picture.shape[1] for frame in frames_shown(picture.shape[1])]
        cards.append(
            [_strip(frames, name), *(_strip(fit(shown[steps], frames.shape[-2:]), text) for text, shown in maps)]
        )
    return Section(lead=lead, rows=cards, has_strips=subject.pictures.shape[2] > 1)


def neighbour_rows(subject: Subject, found: Tensor, similarity: Tensor) -> Section:
    lead = (
        "Each row begins with a test picture; then the training pictures with the most similar features (cosine), "
        "best first."
    )
    if subject.is_labelled:
        lead += " Green ones are of its class, red ones of another."
    rows = []
    for query in one_per_label_in_turn(subject.test.labels, NUM_QUERIES):
        label = int(subject.test.labels[query])
        tiles = [_tile(small(subject.test_thumbnails[query]), _name(subject, label))]
        for index, cosine in zip(found[query].tolist(), similarity[query].tolist(), strict=True):
            other = int(subject.train.labels[index])
            tone = "" if label < 0 or other < 0 else "good" if other == label else "bad"
            text = f"{_name(subject, other)} {cosine:.3f}"
            tiles.append(_tile(small(subject.train_thumbnails[index]), text, tone=tone))
        rows.append(tiles)
    return Section(lead=lead, rows=rows)


def embedding(subject: Subject) -> Section:
    """Every dot a test sample; beside them thumbnails at the places of some."""
    num = len(subject.test.labels)
    rows = torch.linspace(0, num - 1, min(num, MAX_DOTS)).round().long()
    vectors = subject.test.vectors[rows]
    if len(vectors) < 3 or not vectors.isfinite().all():
        return _left_out("There are fewer than three test samples, or their features are not finite.")
    plane, shares = principal_plane(vectors.numpy())
    points = [(x, y) for x, y in plane.tolist()]
    names = [_name(subject, label) for label in subject.test.labels[rows].tolist()]
    lead = (
        f"The features of {len(rows):,} test samples on their two main directions ({shares[0]:.0%} and {shares[1]:.0%} "
        "of the variance); labels under the pointer. What lies together here may still be apart in other directions."
    )
    return Section(
        lead=lead, plane=scatter(points, names), thumbnails=_placed(subject.test_thumbnails[rows], points, names)
    )


def _placed(thumbnails: Tensor, points: Sequence[tuple[float, float]], names: Sequence[str]) -> list[Thumbnail]:
    """Thumbnails where there is room for them, framed in the colour of their class."""
    styles = mark_styles(names)
    scales = [
        Scale(min(v), max(v) if max(v) > min(v) else min(v) + 1, 0, WIDTH - PLACED) for v in zip(*points, strict=True)
    ]
    placed: list[Thumbnail] = []
    for index, (x, y) in enumerate(points):
        left, top = scales[0](x), WIDTH - PLACED - scales[1](y)
        if all(max(abs(left - a), abs(top - b)) > PLACED + 2 for a, b, *_ in placed):
            name = names[index]
            placed.append((left, top, name, mark_class(styles[name]), _encode(small(thumbnails[index]))))
    return placed


def class_bars(subject: Subject) -> Section:
    """Recall of each class, the worst first."""
    if not subject.is_labelled or subject.probabilities is None:
        return _left_out(WITHOUT_PROBE)
    counts = _counts(subject, subject.probabilities)
    totals = counts.sum(dim=1)
    recalls = counts.diag() / totals.clamp_min(1)
    order = [index for index in recalls.argsort(stable=True).tolist() if totals[index]]
    shown = order if len(order) <= MAX_BARS else [*order[: MAX_BARS - BEST_BARS], *order[-BEST_BARS:]]
    lead = f"Share of the test samples of a class that the linear probe names rightly, of {len(order)} classes"
    lead += "." if shown == order else f" the worst {MAX_BARS - BEST_BARS} and the best {BEST_BARS}."
    bars = [(_name(subject, index), float(recalls[index]), f"{int(totals[index]):,}") for index in shown]
    return Section(lead=lead, bars=bars)


def confusion_matrix(subject: Subject) -> Section:
    if not subject.is_labelled or subject.probabilities is None:
        return _left_out(WITHOUT_PROBE)
    counts = _counts(subject, subject.probabilities)
    shares = counts / counts.sum(dim=1, keepdim=True).clamp_min(1)
    lead = "Of the linear probe: a row for each true class, a column for what it was taken for."
    if len(counts) <= MAX_CELLS:
        names = [_name(subject, index) for index in range(len(counts))]
        matrix = _cells(counts, shares, names)
    else:
        matrix = image(_encode(enlarge(heat(shares[None]), MATRIX_SIDE)[0]), "confusion matrix")
        lead += " Each square is a pair of classes, from dark, never, to bright, always."
    return Section(lead=lead, matrix=matrix, confusions=_confusions(subject, counts))


def _cells(counts: Tensor, shares: Tensor, names: Sequence[str]) -> Markup:
    """Percentages of the true class, written where there is room."""
    cells = [
        {
            "row": row, "column": column, "share": (share := float(shares[row, column])),
            "title": f"{names[row]}, taken for {names[column]}: {int(counts[row, column]):,} ({share:.0%})",
        }
        for row, column in counts.nonzero().tolist()
    ]  # fmt: skip
    margin = 12 + 6.5 * min(MAX_NAME, max(map(len, names)))
    return render("matrix.html", names=[name[:MAX_NAME] for name in names], cells=cells, margin=margin, side=CELL)


def _confusions(subject: Subject, counts: Tensor) -> Table:
    """The most frequent ones."""
    wrong = counts - counts.diag().diag()
    most = wrong.flatten().argsort(descending=True, stable=True)[:NUM_CONFUSIONS].tolist()
    lines = []
    for row, column in (divmod(place, len(counts)) for place in most):
        if times := int(wrong[row, column]):
            share = times / int(counts[row].sum())
            lines.append([_name(subject, row), _name(subject, column), f"{times:,}", f"{share:.0%}"])
    return Table(heads=["true class", "taken for", "times", "of the class"], rows=lines, text_columns={1})


def hardest_pictures(subject: Subject) -> Section:
    """The most confidently wrong answers."""
    if not subject.is_labelled or subject.probabilities is None:
        return _left_out(WITHOUT_PROBE)
    tiles = []
    for index in hardest(subject.probabilities, subject.test.labels, NUM_MISTAKES).tolist():
        confidence, predicted = subject.probabilities[index].max(dim=0)
        told = (
            f"{_name(subject, int(predicted))} {confidence:.0%}",
            f"is {_name(subject, int(subject.test.labels[index]))}",
        )
        tiles.append(_tile(small(subject.test_thumbnails[index]), *told, tone="bad"))
    if not tiles:
        return _left_out("The probe makes no mistake.")
    lead = "Where the linear probe is most confident and wrong: its answer, then what is true by the label."
    return Section(lead=lead, tiles=tiles)


def ambiguous_pictures(subject: Subject) -> Section:
    """The two likeliest classes nearly even."""
    if subject.probabilities is None or subject.probabilities.shape[1] < 2:
        return _left_out(WITHOUT_PROBE)
    tiles = []
    for index in most_ambiguous(subject.probabilities, NUM_MISTAKES).tolist():
        best = subject.probabilities[index].topk(2)
        told = [
            f"{_name(subject, c)} {p:.0%}" for p, c in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        label = int(subject.test.labels[index])
        told += [f"is {_name(subject, label)}"] if label >= 0 else []
        tiles.append(_tile(small(subject.test_thumbnails[index]), *told))
    lead = "Where the linear probe can hardly decide between its two likeliest classes."
    return Section(lead=lead, tiles=tiles)


def _counts(subject: Subject, probabilities: Tensor) -> Tensor:
    return confusion_counts(probabilities.argmax(dim=1), subject.test.labels, subject.num_classes)


def _name(subject: Subject, label: int) -> str:
    return label_name(label, subject.classes)


def _left_out(reason: str) -> Section:
    return Section(lead=reason, is_left_out=True)


def _tile(pixels: Tensor, *texts: str, tone: str = "") -> Tile:
    """[3, h, w]"""
    return Tile(_encode(pixels), texts, tone)


def _strip(frames: Tensor, text: str) -> Tile:
    """[F, 3, h, w] side by side"""
    return Tile(_encode(montage([frames]).permute(2, 0, 1)), [text])


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
    """uint8 [C, h, w] -> [3, h, w], the longer side at most SHOWN_SIDE"""
    rgb = to_rgb(picture[None])
    share = SHOWN_SIDE / max(rgb.shape[-2:])
    if share >= 1:
        return rgb[0]
    height, width = (max(1, round(side * share)) for side in rgb.shape[-2:])
    return F.adaptive_avg_pool2d(rgb.float(), (height, width))[0].round().byte()
