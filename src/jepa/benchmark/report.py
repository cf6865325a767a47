"""The results as a table for the terminal, as Markdown, and as a self-contained page."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from jepa.benchmark.results import Results, Row
from jepa.reports.page import Table, bullets, render
from jepa.runs.metrics import write_atomically

MAX_CELLS = 30
"""classes whose confusion matrix is drawn"""
LEGEND = (
    "Top-1 accuracy in percent with its 95 % interval (Wilson's, over test samples); bal.: mean recall of the classes; "
    "±: standard deviation over seeds."
)


def write(results: Results) -> str:
    """eval.md and eval.html in the folder; returns what a terminal shows."""
    write_atomically(results.folder / "eval.md", markdown(results))
    write_atomically(results.folder / "eval.html", html(results))
    return terminal(results)


def table(results: Results) -> Table:
    """A row for each representation."""
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
    return Table(heads=["", *heads], rows=lines)


def _cell(row: Row | None) -> str:
    if row is None:
        return "-"
    spread = f" ± {row.deviation:.1f}" if row.deviation is not None else ""
    return f"{row.top1:.1f}{spread} ({row.low:.1f}-{row.high:.1f})"


def terminal(results: Results) -> str:
    return f"{table(results).terminal()}\n\n{LEGEND}\n{bullets(protocol(results))}"


def markdown(results: Results) -> str:
    parts = [f"# {results.folder.name}", table(results).markdown(), LEGEND, bullets(protocol(results))]
    return "\n\n".join([*parts, bullets(map(_chosen, results.rows.values()))]) + "\n"


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


def _chosen(row: Row) -> str:
    """The hyper-parameters of each trial, and what the row took."""
    found = ["; ".join(f"{key}={value:g}" for key, value in trial["chosen"].items()) for trial in row.trials]
    chosen = f"chosen: {' | '.join(found)}; " if any(found) else ""
    took = ", ".join(f"{name} {value:.1f} s" for name, value in row.seconds.items())
    return f"{_title(row)}: {chosen}{took}"


def html(results: Results) -> str:
    rows, classes = list(results.rows.values()), results.facts["classes"]
    drawn = [(_title(row), _confusion(row.confusion, classes)) for row in rows if row.confusion is not None]
    return render(
        "eval.html", name=results.folder.name, result=table(results), legend=LEGEND, protocol=protocol(results),
        by_class=_by_class(rows, classes), confusions=drawn if len(classes) <= MAX_CELLS else [],
        chosen=list(map(_chosen, rows)),
        versions=", ".join(f"{package} {version}" for package, version in results.facts["versions"].items()),
    )  # fmt: skip


def _title(row: Row) -> str:
    return f"{row.title}, {row.column}"


def _by_class(rows: Sequence[Row], classes: Sequence[str]) -> Table:
    """A bar for each class and row."""
    recalls = [[row.per_class[number] for row in rows] for number in range(len(classes))]
    lines = [["-" if value is None else _bar(value, f"{value:.0f}") for value in values] for values in recalls]
    return Table(
        heads=["", *map(_title, rows)], rows=[[name, *cells] for name, cells in zip(classes, lines, strict=True)]
    )


def _confusion(counts: Sequence[Sequence[int]], classes: Sequence[str]) -> Table:
    """A row for each class, a column for what it was taken for."""
    lines = [[_bar(100 * count / max(1, sum(row)), str(count)) if count else "" for count in row] for row in counts]
    return Table(heads=["", *classes], rows=[[name, *cells] for name, cells in zip(classes, lines, strict=True)])


def _bar(percent: float, text: str) -> Markup:
    """A bar behind a number."""
    return Markup('<div class="share" style="--share:{:.0f}%">{}</div>').format(percent, text)
