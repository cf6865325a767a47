"""The results of jepa-eval for the terminal, as Markdown and as a self-contained page."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from jepa.benchmark.results import Results, Row
from jepa.reports.page import Table, bullets, render
from jepa.runs.metrics import write_atomically

MAX_CONFUSION_CLASSES = 30
"""Number of classes up to which a confusion matrix is drawn with names."""
MAX_NAME = 14
"""Number of characters of a class name in a confusion matrix."""
LEGEND = (
    "Top-1 accuracy in percent with its 95 % interval (Wilson's, over test samples); bal.: mean recall of the classes; "
    "±: standard deviation over seeds."
)


def write(results: Results) -> str:
    """Write eval.md and eval.html to the folder; returns the text for the terminal."""
    write_atomically(results.folder / "eval.md", markdown(results))
    write_atomically(results.folder / "eval.html", html(results))
    return terminal(results)


def table(results: Results) -> Table:
    """A row for each representation."""
    rows = results.rows.values()
    columns = dict.fromkeys(row.column for row in rows)
    uneven = {row.column for row in rows if row.balanced is not None}
    heads = [head for column in columns for head in (column, *([f"{column} bal."] if column in uneven else []))]
    lines = []
    for title in dict.fromkeys(row.title for row in rows):
        cells = [title]
        for column in columns:
            row = results.rows.get((title, column))
            cells.append(_format_cell(row))
            if column in uneven:
                cells.append(f"{row.balanced:.1f}" if row and row.balanced is not None else "-")
        lines.append(cells)
    return Table(heads=["", *heads], rows=lines)


def _format_cell(row: Row | None) -> str:
    if row is None:
        return "-"
    deviation = f" ± {row.deviation:.1f}" if row.deviation is not None else ""
    return f"{row.top1:.1f}{deviation} ({row.low:.1f}-{row.high:.1f})"


def terminal(results: Results) -> str:
    return f"{table(results).terminal()}\n\n{LEGEND}\n{bullets(protocol(results))}"


def markdown(results: Results) -> str:
    parts = [f"# {results.folder.name}", table(results).markdown(), LEGEND, bullets(protocol(results))]
    return "\n\n".join([*parts, bullets(map(_details, results.rows.values()))]) + "\n"


def protocol(results: Results) -> list[str]:
    """Sentences on data, features and probes; a sentence that holds for some rows only names those rows or columns."""
    users: dict[str, list[Row]] = {f"note: {text}": [] for text in results.facts["warnings"]}
    for row in results.rows.values():
        for sentence in row.protocol:
            users.setdefault(sentence, []).append(row)
    lines = []
    for sentence, rows in sorted(users.items(), key=lambda item: _rank(item[0])):
        names = dict.fromkeys(row.column if sentence.startswith("data") else row.title for row in rows)
        is_general = not sentence.startswith(("data", "features")) or len(rows) == len(results.rows)
        lines.append(sentence if is_general else f"{sentence} [{', '.join(names)}]")
    return lines


def _rank(sentence: str) -> int:
    """Sort key: data before features before probes before the rest."""
    kinds = ("data", "features", "probe", "crops", "few-shot", "metric", "seed", "note")
    return next((number for number, kind in enumerate(kinds) if sentence.startswith(kind)), len(kinds))


def _details(row: Row) -> str:
    """The hyper-parameters of each trial and the duration of the row's evaluation."""
    chosen = ["; ".join(f"{key}={value:g}" for key, value in trial["chosen"].items()) for trial in row.trials]
    parameters = f"chosen: {' | '.join(chosen)}; " if any(chosen) else ""
    durations = ", ".join(f"{name} {value:.1f} s" for name, value in row.seconds.items())
    return f"{_title(row)}: {parameters}{durations}"


def html(results: Results) -> str:
    rows, classes = list(results.rows.values()), results.facts["classes"]
    matrices = [
        (_title(row), draw_confusion(row.confusion, classes))
        for row in rows
        if row.confusion is not None and len(classes) <= MAX_CONFUSION_CLASSES
    ]
    return render(
        "eval.html", name=results.folder.name,
        data=results.facts.get("data", ""), result=table(results), legend=LEGEND, protocol=protocol(results),
        by_class=_recalls(rows, classes), confusions=matrices,
        details=list(map(_details, rows)),
        versions=", ".join(f"{package} {version}" for package, version in results.facts["versions"].items()),
    )  # fmt: skip


def _title(row: Row) -> str:
    return f"{row.title}, {row.column}"


def _recalls(rows: Sequence[Row], classes: Sequence[str]) -> Table:
    """The recall of each class in each row of the results."""
    lines = [
        [name, *("-" if value is None else bar(value, f"{value:.0f}") for value in values)]
        for name, *values in zip(classes, *(row.per_class for row in rows), strict=True)
    ]
    return Table(heads=["", *map(_title, rows)], rows=lines)


def draw_confusion(counts: Sequence[Sequence[int]], names: Sequence[str]) -> Markup:
    """An SVG with a row for each true class, a column for each predicted class, and percentages of the true class."""
    cells = [
        {
            "row": row, "column": column, "share": (share := count / sum(values)),
            "title": f"{names[row]}, predicted {names[column]}: {count:,} ({share:.0%})",
        }
        for row, values in enumerate(counts) for column, count in enumerate(values) if count
    ]  # fmt: skip
    margin = 12 + 6.5 * min(MAX_NAME, max(map(len, names)))
    return render("matrix.html", names=[name[:MAX_NAME] for name in names], cells=cells, margin=margin)


def bar(percent: float, text: str) -> Markup:
    """A cell with a bar behind its text."""
    return Markup('<div class="share" style="--share:{:.0f}%">{}</div>').format(percent, text)
