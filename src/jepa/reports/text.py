"""Text for terminals of any encoding."""

from __future__ import annotations

import codecs
import io
import sys
from typing import Any

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


class _Output(io.FileIO):
    """A standard stream that a reader such as `head` may close: the command goes on and prints no more."""

    is_lost = False

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if self.is_lost or isinstance(error, BrokenPipeError):
                return len(data)
            self.is_lost = True  # the interpreter writes once more when it ends
            raise OSError(error.errno, error.strerror, "standard output") from error


def print_any_text() -> None:
    """Let this process print text that its terminal cannot show, such as names of folders, in plain characters."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper):
            continue
        stream.reconfigure(errors="plain")
        if stream is getattr(sys, f"__{name}__"):  # neither one of a test or notebook, nor ours
            stream.flush()
            buffer = io.BufferedWriter(_Output(stream.fileno(), "w", closefd=False))
            is_flushed = stream.line_buffering or stream.write_through
            setattr(sys, name, io.TextIOWrapper(buffer, stream.encoding, "plain", line_buffering=is_flushed))


def printable(text: str) -> str:
    """The text in the characters of standard output."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "plain").decode(encoding)


def duration(seconds: float) -> str:
    """`under 1 s`, `3 s`, `4 min 10 s`, `2 h 05 min`, `3.5 days`."""
    if 0 < seconds < 1:
        return "under 1 s"
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    if seconds < 48 * 3600:
        return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
    return f"{seconds / 86400:.1f} days"
