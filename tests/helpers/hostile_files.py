"""Files as somebody careless or hostile leaves them, drawn by hypothesis, and what reading one may cost."""

from __future__ import annotations

import copy
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from jepa.errors import RunError

MORE_BYTES = 3 << 30
"""Address space that a test may take beyond what the process has."""
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.sampled_from([10**9, 2**31, 2**63, -(2**63), 10**400, 1 << 40]),
    st.floats(), st.text(max_size=5), st.sampled_from(["", "..", "/", "\0", "${oc.env:HOME}", "os.system", "9" * 400]),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
DEEP = st.sampled_from([60, 900, 5000]).map(lambda depth: "[" * depth + "]" * depth)
Change = Callable[[Any], Any]


@contextmanager
def bounded_memory() -> Iterator[None]:
    """Whoever asks for more fails at once, and does not take the machine with it."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MORE_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def changed(content: Any) -> st.SearchStrategy[Any]:
    """The content with one to three values inside replaced, removed or renamed, or another value in its place."""
    steps = st.lists(st.tuples(st.integers(0, 10**6), st.sampled_from(["set", "drop", "rename"]), VALUES), min_size=1)
    return steps.map(lambda drawn: _changed(copy.deepcopy(content), drawn[:3])) | VALUES


def _changed(content: Any, steps: list[tuple[int, str, Any]]) -> Any:
    for number, kind, value in steps:
        places = list(_places(content))
        if not places:
            return value
        holder, key = places[number % len(places)]
        if kind == "set":
            holder[key] = copy.deepcopy(value)
            continue
        old = holder.pop(key)
        if kind == "rename" and isinstance(holder, dict):
            holder[f"{key}_"] = old
    return content


def _places(content: Any) -> Iterator[tuple[Any, Any]]:
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield content, key
        yield from _places(value)


def damaged(data: bytes) -> st.SearchStrategy[bytes]:
    """The bytes cut, with one bit or some bytes changed, or with some put in."""
    places = st.integers(0, max(0, len(data) - 1))
    cut = places.map(lambda place: data[:place])
    flip = st.tuples(places, st.integers(0, 7)).map(
        lambda at: data[: at[0]] + bytes([data[at[0]] ^ 1 << at[1]]) + data[at[0] + 1 :] if data else data
    )
    put = st.tuples(places, st.binary(max_size=12)).map(lambda at: data[: at[0]] + at[1] + data[at[0] + len(at[1]) :])
    return cut | flip | put | st.binary(max_size=40)


def refused_or_read(read: Callable[[], object], name: str, also: tuple[type[Exception], ...] = ()) -> str:
    """ "" where it is read; else the refusal, which is one of ours, names the file and ran out of nothing."""
    try:
        read()
    except (RunError, *also) as error:
        text = str(error)
        assert name in text, text
        assert "allocate memory" not in text
        assert "out of memory" not in text
        return text
    return ""
