"""Text for terminals of any encoding."""

from __future__ import annotations

import codecs
import io
import sys

PLAIN = {"±": "+-", "²": "2"}
"""What stands in ASCII for the characters of our tables; others are printed as escapes."""


def _in_plain_characters(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    characters = error.object[error.start : error.end]
    escapes = (
        PLAIN.get(character) or character.encode("ascii", "backslashreplace").decode() for character in characters
    )
    return "".join(escapes), error.end


codecs.register_error("plain", _in_plain_characters)


def print_any_text() -> None:
    """Let this process print text that its terminal cannot show, such as names of folders, in plain characters."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="plain")


def printable(text: str) -> str:
    """The text in the characters of standard output."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "plain").decode(encoding)
