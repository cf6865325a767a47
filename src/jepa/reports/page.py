"""Tables for the terminal, Markdown and HTML, and self-contained HTML pages without scripts."""

from __future__ import annotations

import base64
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of plain text, which each format escapes; cells of a table that is only shown on a page may be Markup."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    """The first cell is the title of the row. On a page, the last cell of a short row spans the rest."""
    text_columns: Collection[int] = ()
    """Indices of columns that are aligned to the left, like the titles; the others are aligned to the right."""
    best: Collection[tuple[int, int]] = ()
    """(row, column) of the highlighted cells: a star in the terminal, bold elsewhere."""

    def terminal(self, width: int = 0) -> str:
        """Aligned lines; columns are at least `width` characters wide."""
        rows = [[_one_line(head) for head in self.heads], *self._cells(_one_line, mark="{}*")]
        columns = []
        for index, column in enumerate(zip(*rows, strict=True)):
            size = max(width, *map(len, column))
            columns.append([cell.ljust(size) if self._is_left(index) else cell.rjust(size) for cell in column])
        return "\n".join("  ".join(row).rstrip() for row in zip(*columns, strict=True))

    def markdown(self) -> str:
        rule = ["---" if self._is_left(column) else "---:" for column in range(len(self.heads))]
        rows = [map(escape_markdown, self.heads), rule, *self._cells(escape_markdown, mark="**{}**")]
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)

    def html(self, style: str = "") -> Markup:
        """A card with the table; `style` is a CSS class of the card."""
        return render("table.html", table=self, style=style)

    def _cells(self, escape: Callable[[str], str], mark: str) -> list[list[str]]:
        return [
            [mark.format(escape(cell)) if (r, c) in self.best else escape(cell) for c, cell in enumerate(row)]
            for r, row in enumerate(self.rows)
        ]

    def _is_left(self, column: int) -> bool:
        return column == 0 or column in self.text_columns


def _one_line(text: str) -> str:
    return " ".join(text.split())


def escape_markdown(text: str) -> str:
    return _one_line(text).replace("<", "&lt;").replace("|", "\\|")


def bullets(sentences: Iterable[str]) -> str:
    """A Markdown list, also for the terminal."""
    return "\n".join(f"- {sentence}" for sentence in sentences)


def render(template: str, **values: object) -> Markup:
    """Render a template of templates/; text values are escaped, Markup is not."""
    return Markup(_environment().get_template(template).render(values))


@cache
def _environment() -> Environment:
    loader = FileSystemLoader(Path(__file__).with_name("templates"))
    return Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )  # fmt: skip


def image(source: str, text: str) -> Markup:
    """An image element; `source` is a data URL, `text` the alternative text."""
    return Markup('<img alt="{}" src="{}">').format(text, source)


def picture(path: Path) -> Markup:
    """An image element that holds a PNG file."""
    return image(data_url(path.read_bytes()), path.stem)


def data_url(picture: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


def principal_plane(vectors: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """[n, D] -> coordinates [n, 2] on the first two principal components, and their shares of the variance."""
    centred = vectors.astype(np.float64) - vectors.mean(axis=0, dtype=np.float64)
    left, singular, _ = np.linalg.svd(centred, full_matrices=False)
    total = max(float((singular**2).sum()), 1e-30)
    plane = np.pad(left[:, :2] * singular[:2], ((0, 0), (0, max(0, 2 - len(singular)))))
    return plane, [float(s**2) / total for s in [*singular[:2], 0.0][:2]]
