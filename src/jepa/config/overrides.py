"""Overrides as text: of Python values, of names that look like numbers, of the runs of a sweep. Without torch."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hydra.core.override_parser.types import IntervalSweep, Override, Quote, QuotedString

from jepa.config.schema import show_value

KEYWORDS = ("true", "false", "null", "nan", "inf")


def override_literal(value: Any) -> str:
    """A Python value as the right side of an override."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{override_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(override_literal, value)) + "]"
    if not isinstance(value, str | os.PathLike):
        return show_value(value)
    text = os.fspath(value)
    if re.fullmatch(r"(?!\.\d)[A-Za-z_./][\w./-]*", text, re.ASCII) and text.lower() not in KEYWORDS:
        return text
    return QuotedString(text, Quote.single).with_quotes()


def name_as_text(override: str) -> str:
    """`name=007,1e3` as `name='007','1e3'`, which Hydra does not read as numbers; any other override as it is."""
    key, _, value = override.partition("=")
    if key != "name" or not re.fullmatch(r"[\w.+-]+(,[\w.+-]+)*", value):
        return override
    return f"name={','.join(map(override_literal, value.split(',')))}"


def as_typed(value: Any, text: str) -> Any:
    """The text of a plain value, or a list of the texts of its items; `value` for anything with quotes or brackets."""
    if isinstance(value, list) and value and re.fullmatch(r"\[[^\[\]{}'\"\\$]*\]", text):
        return [item.strip() for item in text[1:-1].split(",")]
    return text if value is None or isinstance(value, bool | int | float) else value


def members(parsed: Sequence[Override]) -> Iterator[list[str]]:
    """The overrides of every run of a sweep; an interval gives its two ends."""
    axes = []
    for override in parsed:
        key, values = override.get_key_element(), override.value()
        if isinstance(values, IntervalSweep):
            axes.append([f"{key}={values.start}", f"{key}={values.end}"])
        elif override.is_sweep_override():
            axes.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        else:
            axes.append([override.input_line or ""])
    yield from map(list, itertools.product(*axes))
