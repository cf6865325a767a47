"""Bars: they move on a terminal and in a notebook, and are lines in a file."""

from __future__ import annotations

import io
import sys

import pytest

from jepa.parallel import bars


def test_where_nothing_can_move_a_bar_is_lines_that_are_not_drawn_over(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bars, "LINE_SECONDS", 0)
    with bars.bar(total=3, desc="collect", unit="frame") as shown:
        for _ in range(3):
            shown.update(1)
    printed = capsys.readouterr().err
    assert "\r" not in printed
    assert "collect: 2/3 frame, " in printed
    assert all(line.startswith("collect: ") for line in printed.splitlines())


def test_short_work_prints_nothing_in_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(bars.bar(range(3), desc="heads")) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_on_a_terminal_it_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    assert list(bars.bar(range(2), desc="heads", delay=0)) == [0, 1]
    assert "\rheads: " in terminal.getvalue()
