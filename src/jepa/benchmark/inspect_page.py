"""inspect.html: what an encoder makes of a data set, in one file that needs no service, script or network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jepa.benchmark.inspect import (
    Observed,
    Subject,
    agreement,
    hardest,
    in_turn,
    most_ambiguous,
    observe,
)
from jepa.benchmark.tiles import data_url, image, line, small, strip, tile
from jepa.evaluation.embeddings import label_name
from jepa.evaluation.pictures import enlarge, film, fit, frames_shown, heat, principal_colours
from jepa.evaluation.probe import confusion_counts, nearest
from jepa.reports.charts import WIDTH, Scale, mark_class, mark_styles, scatter
from jepa.reports.page import page, principal_plane
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
WITHOUT_PROBE = "Left out: it needs the answers of a linear probe, and labels in both parts of the data set."


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
    links = " ".join(f'<a href="#{_anchor(title)}">{escape(title)}</a>' for title in sections)
    parts = [_header(subject, observed, found), f"<nav>{links}</nav>"]
    parts += [f'<section id="{_anchor(title)}"><h2>{title}</h2>{body}</section>' for title, body in sections.items()]
    target = Path(folder) / "inspect.html"
    write_atomically(target, page(f"{subject.title} - inspection", parts))
    return target


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def _header(subject: Subject, observed: Observed, found: Tensor) -> str:
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
    shown = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts.items())
    protocol = "".join(f"<li>{escape(sentence)}</li>" for sentence in subject.protocol)
    return (
        f'<header><h1>{escape(subject.title)}</h1><span class="muted">what the encoder sees</span></header>'
        f'<dl class="facts">{shown}</dl>'
        + (f"<details><summary>How it was measured</summary><ul>{protocol}</ul></details>" if protocol else "")
    )


def feature_maps(subject: Subject, observed: Observed) -> str:
    if not observed.tokens.isfinite().all():
        return _left_out("The features are not finite.")
    colours, shares = principal_colours(observed.tokens, observed.grid)  # [P, 3, t, h, w]
    share = ", ".join(f"{share:.0%}" for share in shares)
    lead = (
        "Each patch in the colour of its features: their three main directions over all these pictures are red, green "
        f"and blue ({share} of the variance). Parts of one colour are alike to the encoder."
    )
    shown = [[("features", enlarge(maps.transpose(0, 1)))] for maps in colours]
    return _lead(lead) + _beside_pictures(subject, shown)


def attention_maps(subject: Subject, observed: Observed) -> str:
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
    for index, looks in enumerate(attention.looks):
        maps = [("received", attention.received[index], None)]
        if attention.class_token is not None:
            maps.append(("class token", attention.class_token[index], None))
        maps += [("looks", look, query) for look, query in zip(looks, observed.queries, strict=True)]
        rows.append([(f"{name} {_peak(values):.1f}x", _heat_map(values, grid, query)) for name, values, query in maps])
    return _lead(lead) + _beside_pictures(subject, rows)


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


def _beside_pictures(subject: Subject, rows: Sequence[Sequence[tuple[str, Tensor]]]) -> str:
    """Names and maps uint8 [t, 3, H, W] of each of the first pictures: tiles beside it, of a clip strips under it."""
    cards = []
    for index, maps in enumerate(rows):
        picture, name = subject.pictures[index], _name(subject, int(subject.test.labels[index]))
        if picture.shape[1] == 1:
            tiles = [tile(small(picture[:, 0]), name), *(tile(shown[0], text) for text, shown in maps)]
            cards.append(line(tiles))
            continue
        frames = enlarge(torch.stack([small(frame) for frame in film(picture)]))
        steps = [frame * len(maps[0][1]) // picture.shape[1] for frame in frames_shown(picture.shape[1])]
        strips = [strip(frames, name), *(strip(fit(shown[steps], frames.shape[-2:]), text) for text, shown in maps)]
        cards.append(f'<div class="card scroll">{"".join(strips)}</div>')
    pairs = " pairs" if len(rows[0]) == 1 and subject.pictures.shape[2] == 1 else ""
    return f'<div class="rows{pairs}">{"".join(cards)}</div>'


def neighbour_rows(subject: Subject, found: Tensor, similarity: Tensor) -> str:
    lead = (
        "Each row begins with a test picture; then the training pictures with the most similar features (cosine), "
        "best first."
    )
    if subject.is_labelled:
        lead += " Green ones are of its class, red ones of another."
    rows = []
    for query in in_turn(subject.test.labels, NUM_QUERIES):
        label = int(subject.test.labels[query])
        tiles = [tile(small(subject.test_thumbnails[query]), _name(subject, label))]
        for index, cosine in zip(found[query].tolist(), similarity[query].tolist(), strict=True):
            other = int(subject.train.labels[index])
            tone = "" if label < 0 or other < 0 else "good" if other == label else "bad"
            text = f"{_name(subject, other)} {cosine:.3f}"
            tiles.append(tile(small(subject.train_thumbnails[index]), text, tone=tone))
        rows.append(line(tiles))
    return f'{_lead(lead)}<div class="rows">{"".join(rows)}</div>'


def embedding(subject: Subject) -> str:
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
    return (
        f'{_lead(lead)}<div class="pair"><div class="card plane">{scatter(points, names)}</div>'
        f'<div class="card plane">{_placed(subject.test_thumbnails[rows], points, names)}</div></div>'
    )


def _placed(thumbnails: Tensor, points: Sequence[tuple[float, float]], names: Sequence[str]) -> str:
    """Thumbnails where there is room for them, framed in the colour of their class."""
    styles = mark_styles(names)
    scales = [
        Scale(min(v), max(v) if max(v) > min(v) else min(v) + 1, 0, WIDTH - PLACED) for v in zip(*points, strict=True)
    ]
    taken, drawn = [], []
    for index, (x, y) in enumerate(points):
        left, top = scales[0](x), WIDTH - PLACED - scales[1](y)
        if all(max(abs(left - a), abs(top - b)) > PLACED + 2 for a, b in taken):
            taken.append((left, top))
            place = f'x="{left:.1f}" y="{top:.1f}" width="{PLACED}" height="{PLACED}"'
            source = data_url(small(thumbnails[index]))
            drawn.append(
                f'<g><title>{escape(names[index])}</title><image {place} href="{source}"/>'
                f'<rect class="edge {mark_class(styles[names[index]])}" {place}/></g>'
            )
    size = f'viewBox="-2 -2 {WIDTH + 4} {WIDTH + 4}"'
    return f'<svg {size} role="img" aria-label="thumbnails in the plane">{"".join(drawn)}</svg>'


def class_bars(subject: Subject) -> str:
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
    bars = [
        f"<span>{escape(_name(subject, index))}</span>"
        f'<span class="bar"><span style="width:{recalls[index]:.1%}"></span></span>'
        f"<span>{recalls[index]:.0%} <small>of {int(totals[index]):,}</small></span>"
        for index in shown
    ]
    return f'{_lead(lead)}<div class="card bars">{"".join(bars)}</div>'


def confusion_matrix(subject: Subject) -> str:
    if not subject.is_labelled or subject.probabilities is None:
        return _left_out(WITHOUT_PROBE)
    counts = _counts(subject, subject.probabilities)
    shares = counts / counts.sum(dim=1, keepdim=True).clamp_min(1)
    lead = "Of the linear probe: a row for each true class, a column for what it was taken for."
    if len(counts) <= MAX_CELLS:
        names = [_name(subject, index) for index in range(len(counts))]
        drawn = _cells(counts, shares, names)
    else:
        drawn = image(enlarge(heat(shares[None]), MATRIX_SIDE)[0], "confusion matrix")
        lead += " Each square is a pair of classes, from dark, never, to bright, always."
    return f'{_lead(lead)}<div class="pair"><div class="card scroll">{drawn}</div>{_confusions(subject, counts)}</div>'


def _cells(counts: Tensor, shares: Tensor, names: Sequence[str]) -> str:
    """Percentages of the true class, written where there is room."""
    num, margin = len(names), 12 + 6.5 * min(MAX_NAME, max(map(len, names)))
    parts = []
    for row, name in enumerate(names):
        middle = (row + 0.5) * CELL + 4
        parts.append(
            f'<text class="tick" x="{margin - 6}" y="{middle}" text-anchor="end">{escape(name[:MAX_NAME])}</text>'
        )
        turned = f'transform="translate({margin + middle} {num * CELL + 8}) rotate(-90)"'
        parts.append(f'<text class="tick" {turned} text-anchor="end">{escape(name[:MAX_NAME])}</text>')
    for row, column in counts.nonzero().tolist():
        share, x, y = float(shares[row, column]), margin + column * CELL, row * CELL
        tone = "right" if row == column else "wrong"
        title = f"{names[row]}, taken for {names[column]}: {int(counts[row, column]):,} ({share:.0%})"
        place = f'x="{x + CELL / 2}" y="{y + CELL / 2 + 4}"'
        text = f'<text class="tick" {place} text-anchor="middle">{100 * share:.0f}</text>'
        parts.append(
            f'<g><title>{escape(title)}</title><rect class="cell {tone}" x="{x}" y="{y}" width="{CELL}" '
            f'height="{CELL}" fill-opacity="{0.08 + 0.7 * share:.2f}"/>{text}</g>'
        )
    width, height = margin + num * CELL + 2, num * CELL + margin + 4
    size = f'viewBox="0 0 {width:g} {height:g}" style="width:{width:g}px"'
    return f'<svg class="matrix" {size} role="img" aria-label="confusion matrix">{"".join(parts)}</svg>'


def _confusions(subject: Subject, counts: Tensor) -> str:
    """A table of the most frequent ones."""
    wrong = counts - counts.diag().diag()
    most = wrong.flatten().argsort(descending=True, stable=True)[:NUM_CONFUSIONS].tolist()
    lines = []
    for row, column in (divmod(place, len(counts)) for place in most):
        if wrong[row, column]:
            share = int(wrong[row, column]) / int(counts[row].sum())
            true, taken = (escape(_name(subject, index)) for index in (row, column))
            times = f"<td>{int(wrong[row, column]):,}</td><td>{share:.0%}</td>"
            lines.append(f'<tr><th>{true}</th><td class="words">{taken}</td>{times}</tr>')
    if not lines:
        return '<div class="card"><p class="empty">The probe makes no mistake.</p></div>'
    heads = '<th>true class</th><th class="words">taken for</th><th>times</th><th>of the class</th>'
    return (
        f'<div class="card scroll"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
    )


def hardest_pictures(subject: Subject) -> str:
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
        tiles.append(tile(small(subject.test_thumbnails[index]), *told, tone="bad"))
    if not tiles:
        return _left_out("The probe makes no mistake.")
    lead = "Where the linear probe is most confident and wrong: its answer, then what is true by the label."
    return f'{_lead(lead)}<div class="card tiles">{"".join(tiles)}</div>'


def ambiguous_pictures(subject: Subject) -> str:
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
        tiles.append(tile(small(subject.test_thumbnails[index]), *told))
    lead = "Where the linear probe can hardly decide between its two likeliest classes."
    return f'{_lead(lead)}<div class="card tiles">{"".join(tiles)}</div>'


def _counts(subject: Subject, probabilities: Tensor) -> Tensor:
    return confusion_counts(probabilities.argmax(dim=1), subject.test.labels, subject.num_classes)


def _name(subject: Subject, label: int) -> str:
    return label_name(label, subject.classes)


def _lead(text: str) -> str:
    return f'<p class="lead">{escape(text)}</p>'


def _left_out(reason: str) -> str:
    return f'<p class="empty">{escape(reason)}</p>'
