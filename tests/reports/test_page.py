"""Tables in all formats, and pages: the same cells everywhere, and no text becomes markup."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import pytest
from hostile_text import HOSTILE, count_as_text
from jinja2 import UndefinedError
from markupsafe import Markup
from synthetic_run import write_run

from jepa.reports import page
from jepa.reports.charts import Chart, Line, ReferenceLine, line_chart, scatter
from jepa.reports.page import Table, data_url, image, render
from jepa.reports.run import write_report
from jepa.runs.metrics import FolderLogger

TABLE = Table(
    heads=["", "method", "kNN"], rows=[["a", "words", "1.5 %"], ["bcd", "w", "20.0 %"]], text_columns={1}, best={(1, 2)}
)


def test_a_table_in_a_terminal_is_aligned_and_marks_the_best_by_a_star():
    assert TABLE.terminal().splitlines() == [
        "     method      kNN",
        "a    words     1.5 %",
        "bcd  w       20.0 %*",
    ]
    assert {len(line) for line in TABLE.terminal(12).splitlines()} == {3 * 12 + 2 * 2}


def test_a_table_in_markdown_aligns_words_to_the_left_and_marks_the_best_bold():
    assert TABLE.markdown().splitlines() == [
        "|  | method | kNN |",
        "| --- | --- | ---: |",
        "| a | words | 1.5 % |",
        "| bcd | w | **20.0 %** |",
    ]


def test_a_table_on_a_page_marks_words_and_the_best():
    html = TABLE.html("wide")
    assert '<div class="card scroll wide">' in html
    assert '<th class="words">method</th>' in html
    assert "<td><b>20.0 %</b></td>" in html
    assert html.count("<b>") == 1


def test_the_last_cell_of_a_short_row_spans_the_rest():
    html = Table(heads=["", "a", "b", "c"], rows=[["x", "y"], ["x", "1", "2", "3"]]).html()
    assert html.count("colspan") == 1
    assert '<td colspan="3" class="words">y</td>' in html


def test_a_table_without_rows_has_its_heading_in_every_format():
    table = Table(heads=["size", "speed"], rows=[])
    assert table.terminal() == "size  speed"
    assert table.markdown().splitlines()[0] == "| size | speed |"
    assert "<th>speed</th>" in table.html()


def test_no_cell_becomes_markup_or_another_cell_or_line():
    table = Table(heads=["", HOSTILE], rows=[[HOSTILE, HOSTILE], ["title", f"two\nlines {HOSTILE}"]], best={(0, 1)})
    assert count_as_text(table.html()) == 4
    lines = table.markdown().splitlines()
    assert len(lines) == 4
    assert all(line.replace("\\|", "").count("|") == 3 for line in lines)
    assert "<" not in table.markdown()
    assert len(table.terminal().splitlines()) == 3
    assert table.terminal().count(HOSTILE) == 4


def test_markup_in_a_cell_stays_markup_and_what_is_formatted_into_it_is_escaped():
    link = Markup('<a href="{}">report</a>').format(HOSTILE)
    html = Table(heads=["", ""], rows=[["x", link]]).html()
    assert "<td><a href=" in html
    assert count_as_text(html) == 1


def test_a_picture_is_held_by_the_page():
    html = image(data_url(b"png bytes"), HOSTILE)
    assert count_as_text(html) == 1
    assert base64.b64encode(b"png bytes").decode() in html


def test_a_value_that_a_template_lacks_is_an_error():
    with pytest.raises(UndefinedError, match="lines"):
        render("find.html", name="x")


def test_no_word_of_a_chart_becomes_markup():
    chart = Chart(title=HOSTILE, unit=HOSTILE, hint=HOSTILE, axis=HOSTILE)
    line, level = Line(name=HOSTILE, points=[(0, 1.0), (1, 2.0)]), ReferenceLine(name=HOSTILE, value=1.5)
    assert count_as_text(line_chart(chart, [line], [level])) > 8
    assert count_as_text(scatter([(0, 0), (1, 1)], [HOSTILE, "b"])) == 2


def test_no_text_of_a_run_becomes_markup_on_its_report(tmp_path):
    folder = write_run(tmp_path / "a&<b>", steps=2, eval_every=2, name=HOSTILE, status="failed", message=HOSTILE)
    (folder / "config.yaml").write_text(f"name: {HOSTILE}", encoding="utf-8")
    FolderLogger(folder=folder, config={}, run_id="a", resume_step=2).log(3, {f"x/{HOSTILE}": 1.0})
    media = folder / "media" / "step_00000002"
    picture = '<i>&"quotes"'
    (media / "masks.png").rename(media / f"{picture}.png")
    (media / "captions.json").write_text('{"features": "<script>caption"}')
    html = write_report(folder).read_text()
    assert count_as_text(html) >= 6  # title, name, message, configuration, metric and its legend
    assert count_as_text(html, picture) == 2
    assert count_as_text(html, "<script>caption") == 1


def test_tables_scroll_in_their_box_while_their_first_column_stays():
    templates = Path(page.__file__).with_name("templates")
    tables = [path for path in templates.glob("*.html") if "<table" in path.read_text()]
    assert tables == [templates / "table.html"]
    assert "card scroll" in tables[0].read_text()
    style = (templates / "page.css").read_text()
    assert re.search(r"\.scroll \{[^}]*overflow-x: auto", style)
    assert re.search(r"\.scroll th:first-child \{ position: sticky; left: 0;", style)
