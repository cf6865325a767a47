"""What a comparison says first: which method is ahead and by how much, or that it is unclear."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from jepa.comparison.results import MIN_SEEDS, Comparison, Spread, leader


class Headline(NamedTuple):
    word: str
    reason: str
    is_clear: bool = False
    """whether a method is ahead of all others and of what needs no training"""

    def __str__(self) -> str:
        return " ".join(f"{self.word}: {self.reason}".split())


def headline(comparison: Comparison) -> Headline:
    """The best method by the first probe beside the second."""
    if not comparison.probes:
        return Headline("no ranking", "no probe was measured, and nothing else ranks the methods")
    column = comparison.probes[0]
    ranked = [(method.label, value) for method in comparison.methods if (value := method.last(column.metric))]
    if not ranked:
        return Headline("no ranking", f"{column.head} was not measured after step 0")
    (label, best), *others = ranked
    floors = [(title, values[comparison.columns.index(column)]) for title, values in comparison.baselines]
    stronger = [f"{title} {column.cell(value.mean)}" for title, value in floors if value and value.mean >= best.mean]
    behind = f"; no better than {' and '.join(stronger)}" if stronger else ""
    text = f"{column.head} of {label} {column.cell(best.mean)}"
    if not others:
        return Headline("one method", f"{text}, from {_seeds([best])}{behind}")
    rival, second = others[0]
    text += f", of {rival} {column.cell(second.mean)}, from {_seeds([best, second])}"
    if min(value.n for _, value in ranked) < MIN_SEEDS:
        return Headline("unclear", f"{text}: too few to tell methods apart, give seed=0,1,2 or more{behind}")
    if leader([value for _, value in ranked], comparison.margin_of(column)) is None:
        return Headline("unclear", f"{text}: the difference may be chance{behind}")
    return Headline(f"{label} is ahead by {best.mean - second.mean:.1f} points", text + behind, not behind)


def _seeds(values: Sequence[Spread]) -> str:
    """`1 seed`, `3 seeds each`, `3 and 2 seeds`."""
    counts = [value.n for value in values]
    if len(set(counts)) > 1:
        return f"{' and '.join(map(str, counts))} seeds"
    return f"{counts[0]} seed{'s' * (counts[0] > 1)}{' each' * (len(counts) > 1)}"
