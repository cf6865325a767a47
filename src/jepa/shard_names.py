"""Which tar files a pattern names. Without torch."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator
from pathlib import Path


def find_shards(pattern: str) -> list[Path]:
    """The files of `train-{000..146}.tar`, of a glob, of a folder (its .tar), or one; absolute, each once.

    Raises ValueError with a sentence that has neither key nor value.
    """
    named = [Path(name).expanduser().absolute() for name in _expand(pattern)]
    found = list(dict.fromkeys(file for path in named for file in _files(path)))
    missing = [path for path in found if not path.is_file()]
    if missing:
        count = f" ({len(missing)} of {len(found)} are missing)" if len(found) > 1 else ""
        raise ValueError(f"there is no {missing[0]}{count}")
    if not found:
        raise ValueError("no .tar file is there")
    other = next((path for path in found if path.suffix != ".tar"), None)
    if other is not None:
        raise ValueError(f"{other} is no .tar; unpack what is compressed (gunzip), no sample can be read out of it")
    return found


def _expand(pattern: str) -> Iterator[str]:
    """Every {a,b} and {00..12} written out, as a shell does."""
    braces = re.search(r"\{([^{}]*)\}", pattern)
    if braces is None:
        yield pattern
        return
    bounds = re.fullmatch(r"(\d+)\.\.(\d+)", braces[1])
    for choice in _numbers(bounds[1], bounds[2]) if bounds else braces[1].split(","):
        yield from _expand(f"{pattern[: braces.start()]}{choice}{pattern[braces.end() :]}")


def _numbers(first: str, last: str) -> Iterator[str]:
    width = max(len(first), len(last)) if first.startswith("0") else 0
    return (str(number).zfill(width) for number in range(int(first), int(last) + 1))


def _files(path: Path) -> list[Path]:
    if any(sign in str(path) for sign in "*?["):
        return sorted(map(Path, glob.glob(str(path), recursive=True)))
    return sorted(path.glob("*.tar")) if path.is_dir() else [path]
