"""A text that becomes markup wherever a page or a table forgets to escape it, and what a browser makes of a page."""

from __future__ import annotations

import re
from html.parser import HTMLParser

HOSTILE = "<script>alert(1)</script> & \"quotes\" | 'single'"


class Browser(HTMLParser):
    """Collects tags, names of attributes, and all text, that of attributes too."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(str(html))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.text += " ".join(value or "" for _, value in attrs)

    def handle_data(self, data: str) -> None:
        self.text += data


def count_as_text(html: str, text: str = HOSTILE) -> int:
    """How often the text is read on the page; fails where any of it has become markup."""
    browser = Browser(html)
    assert "script" not in browser.tags
    assert all(re.fullmatch(r"[a-z-]+", name) for name in browser.attributes), browser.attributes
    assert text not in html
    return browser.text.count(text)
