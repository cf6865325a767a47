"""The table of a run: untrained encoder, raw pixels and trained encoder, one column a metric. Without torch."""

from __future__ import annotations

from typing import NamedTuple

from jepa.reports.verdict import (
    CLASSIFIED,
    CLASSIFIER,
    DETECTED,
    NOT_MEASURED,
    UNTRAINED,
    WORLD_ERRORS,
    Rows,
    last_value,
    regressions,
    series,
    with_prefix,
)


class Column(NamedTuple):
    head: str
    metric: str
    unit: str = " %"
    digits: int = 1

    def cell(self, value: float | None, deviation: float | None = None) -> str:
        if value is None:
            return NOT_MEASURED
        spread = "" if deviation is None else f" ± {deviation:.{self.digits}f}"
        return f"{value:.{self.digits}f}{spread}{self.unit}"


def table_columns(rows: Rows) -> list[Column]:
    """Columns for kNN and linear accuracy (balanced if classes are uneven), the other probes and the rank.

    In the row of the untrained encoder, "fine-tuned" is training on labels alone. A detector has its mean average
    precisions instead.
    """
    names = {name for row in rows for name in row}
    if names & DETECTED.keys():
        tested = {metric.replace("/", "/test_"): f"test {head}" for metric, head in DETECTED.items()}
        return [Column(head, name) for name, head in (DETECTED | tested).items() if name in names]
    fields = [Column(f"{name} R²", metric) for metric, name in regressions(rows)]
    is_world = "predict/shuffled_error" in names
    columns = [Column(head, f"predict/{name}", "", 3) for name, head in WORLD_ERRORS.items()] if is_world else []
    for probe in ("classifier", "knn", "linear", "attentive", "finetune"):
        kind = "balanced" if f"probe/{probe}_balanced" in names else "top1"
        head = {"knn": "kNN", "finetune": "fine-tuned"}.get(probe, probe) + (" bal." if kind == "balanced" else "")
        always = probe in ("knn", "linear") and not fields and not is_world and CLASSIFIED not in names
        if always or f"probe/{probe}_{kind}" in names:
            columns.append(Column(head, f"probe/{probe}_{kind}"))
    return [*columns, *fields, Column("rank", "collapse/rank", "")]


def table_rows(rows: Rows, initial: str = UNTRAINED) -> list[tuple[str, list[float | None]]]:
    """Title and a value for each of `table_columns`: encoder of step 0, raw pixels, one frame, trained encoder."""
    names = [column.metric for column in table_columns(rows)]
    step = max((s for name in names for s, _ in series(rows, name)), default=0)
    start = [dict(series(rows, name)).get(0) for name in names]
    trained = [last_value(rows, name, after=0) for name in names]
    when = f"step {step}" if step else "not evaluated yet"
    if names[0] in DETECTED or names[0].startswith(CLASSIFIER):
        model = "detector" if names[0] in DETECTED else "classifier"
        before = f"{initial} {model}" if initial == UNTRAINED else f"{initial} encoder, untrained head"
        return [(before, start), (f"trained {model}, {when}", trained)]
    still = [last_value(rows, with_prefix(name, "still/"), after=0) for name in names]
    return [
        (f"{initial} encoder", start),
        ("raw pixels", [last_value(rows, with_prefix(name, "baseline/pixels_")) for name in names]),
        *([("trained, middle frame only", still)] if any(value is not None for value in still) else []),
        (f"trained encoder, {when}", trained),
    ]
