"""The results as a table for the terminal, as Markdown, and as a self-contained page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from jepa.benchmark.results import Results, Row
from jepa.reports.page import page
from jepa.runs.metrics import write_atomically

MAX_CELLS = 30
"""classes whose confusion matrix is drawn"""
LEGEND = (
    "Top-1 accuracy in percent with its 95 % interval (Wilson's, over test samples); bal.: mean recall of the classes; "
    "±: standard deviation over seeds."
)
Table = tuple[list[str], list[list[str]]]


def write(results: Results) -> str:
    """eval.md and eval.html in the folder; returns what a terminal shows."""
    write_atomically(results.folder / "eval.md", markdown(results))
    write_atomically(results.folder / "eval.html", html(results))
    return terminal(results)


def table(results: Results) -> Table:
    """Headings, and a line for each representation, its title first."""
    rows = list(results.rows.values())
    columns = list(dict.fromkeys(row.column for row in rows))
    uneven = {row.column for row in rows if row.balanced is not None}
    heads = [head for column in columns for head in (column, *([f"{column} bal."] if column in uneven else []))]
    lines = []
    for title in dict.fromkeys(row.title for row in rows):
        cells = [title]
        for column in columns:
            row = results.rows.get((title, column))
            cells.append(_cell(row))
            if column in uneven:
                cells.append(f"{row.balanced:.1f}" if row and row.balanced is not None else "-")
        lines.append(cells)
    return heads, lines


def _cell(row: Row | None) -> str:
    if row is None:
        return "-"
    spread = f" ± {row.deviation:.1f}" if row.deviation is not None else ""
    return f"{row.top1:.1f}{spread} ({row.low:.1f}-{row.high:.1f})"


def terminal(results: Results) -> str:
    heads, lines = table(results)
    shown = [["", *heads], *lines]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    texts = [
        line[0].ljust(widths[0]) + "".join(f"  {t:>{w}}" for t, w in zip(line[1:], widths[1:], strict=True))
        for line in shown
    ]
    return "\n".join([*texts, "", LEGEND, *(f"- {sentence}" for sentence in protocol(results))])


def protocol(results: Results) -> list[str]:
    """Sentences on the data, then one for each way of features and probe, with the rows or columns that they are of."""
    told = []
    users: dict[str, list[Row]] = {f"note: {text}": [] for text in results.facts["warnings"]}
    for row in results.rows.values():
        for sentence in row.protocol:
            users.setdefault(sentence, []).append(row)
    every = len(results.rows)
    for sentence, rows in sorted(users.items(), key=lambda item: _rank(item[0])):
        kind = sentence.partition(":")[0]
        named = {"data": (row.column for row in rows), "features": (row.title for row in rows)}
        names = list(dict.fromkeys(named.get(kind.split()[0], ())))
        told.append(sentence if not names or len(rows) == every else f"{sentence} [{', '.join(names)}]")
    return told


def _rank(sentence: str) -> int:
    """Data before features before probes before the rest."""
    kinds = ("data", "features", "probe", "crops", "few-shot", "metric", "seed", "note")
    return next((number for number, kind in enumerate(kinds) if sentence.startswith(kind)), len(kinds))


def markdown(results: Results) -> str:
    heads, lines = table(results)
    text = [f"# {results.folder.name}", "", _md(["", *heads]), _md(["---", *["---:"] * len(heads)])]
    text += [*map(_md, lines), "", LEGEND, "", *(f"- {sentence}" for sentence in protocol(results))]
    text += ["", *(f"- {chosen}" for row in results.rows.values() if (chosen := _chosen(row)))]
    return "\n".join(text) + "\n"


def _md(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _chosen(row: Row) -> str:
    """The hyper-parameters of each trial, and what the row took."""
    found = ["; ".join(f"{key}={value:g}" for key, value in trial["chosen"].items()) for trial in row.trials]
    chosen = f"chosen: {' | '.join(found)}; " if any(found) else ""
    took = ", ".join(f"{name} {value:.1f} s" for name, value in row.seconds.items())
    return f"{row.title}, {row.column}: {chosen}{took}"


def html(results: Results) -> str:
    name, facts = results.folder.name, results.facts
    heads, lines = table(results)
    body = [_tr(line) for line in lines]
    told = "".join(f"<li>{escape(sentence)}</li>" for sentence in protocol(results))
    rows = list(results.rows.values())
    details = "".join(f"<li>{escape(_chosen(row))}</li>" for row in rows)
    versions = ", ".join(f"{package} {version}" for package, version in facts["versions"].items())
    parts = [
        f'<header><h1>{escape(name)}</h1><span class="muted">jepa-eval</span></header>',
        _table(["", *heads], body), f'<p class="lead">{escape(LEGEND)}</p>',
        f"<h2>Protocol</h2><ul>{told}</ul>",
        "<h2>Accuracy by class</h2>", _by_class(rows, facts["classes"]),
        "<h2>Confusion</h2>", *(_confusion(row, facts["classes"]) for row in rows),
        f"<h2>Chosen and spent</h2><ul>{details}</ul>",
        f'<p class="muted">{escape(versions)}</p>',
    ]  # fmt: skip
    return page(f"{name} - jepa-eval", parts)


def _table(heads: Sequence[str], lines: Sequence[str]) -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    return (
        f'<div class="card scroll compared"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _tr(cells: Sequence[str]) -> str:
    return f"<tr><th>{escape(cells[0])}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in cells[1:])}</tr>"


def _by_class(rows: Sequence[Row], classes: Sequence[str]) -> str:
    """A bar for each class and row."""
    lines = []
    for number, name in enumerate(classes):
        cells = [row.per_class[number] for row in rows]
        bars = "".join(f"<td>{'-' if value is None else _shade(value, f'{value:.0f}')}</td>" for value in cells)
        lines.append(f"<tr><th>{escape(name)}</th>{bars}</tr>")
    return _table(["", *(f"{row.title}, {row.column}" for row in rows)], lines)


def _shade(percent: float, text: str) -> str:
    """A bar behind a number."""
    colour = "color-mix(in srgb,var(--c4) 40%,transparent)"
    style = f"background:linear-gradient(90deg,{colour} {percent:.0f}%,transparent {percent:.0f}%)"
    return f'<div style="{style};border-radius:4px;padding:0 6px;min-width:64px">{text}</div>'


def _confusion(row: Row, classes: Sequence[str]) -> str:
    if row.confusion is None or len(classes) > MAX_CELLS:
        return ""
    lines = []
    for number, name in enumerate(classes):
        counts = row.confusion[number]
        total = max(1, sum(counts))
        cells = "".join(f"<td>{_shade(100 * count / total, str(count)) if count else ''}</td>" for count in counts)
        lines.append(f"<tr><th>{escape(name)}</th>{cells}</tr>")
    title = f"{escape(row.title)}, {escape(row.column)}: a row for each class, a column for what it was taken for"
    return f"<details><summary>{title}</summary>{_table(['', *classes], lines)}</details>"
