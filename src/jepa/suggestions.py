"""The valid names nearest to a wrong one, and other help in messages. Without torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

SYNONYMS = {
    "learning_rate": "lr",
    "wd": "schedule.weight_decay",
    "warmup": "schedule.warmup_ratio",
    "ema": "objective.momentum",
    "model": "encoder",
    "arch": "encoder",
    "model_size": "size",
    "data": "dataset",
    "data_dir": "dataset.root_path",
    "root": "dataset.root_path",
    "img_size": "image_size",
    "resolution": "image_size",
    "dtype": "precision",
    "amp": "precision",
    "output_dir": "name",
    "accumulate": "micro_batch_size",
    "grad_accum": "micro_batch_size",
    "workers": "num_workers",
}
"""What other programs call it."""


def nearest(name: str, known: Iterable[str], limit: int = 3) -> list[str]:
    """Known names that a wrong one may have meant: the same leaf elsewhere, a synonym, or a slip of the keys."""
    known = sorted(set(known))
    leaf = name.rpartition(".")[2]
    if leaf in known and leaf != name:
        return [leaf]
    if same := [key for key in known if key.rpartition(".")[2] == leaf and key != name]:
        return same
    if SYNONYMS.get(leaf) in known:
        return [SYNONYMS[leaf]]
    scores = {key: _likeness(name, leaf, key) for key in known}
    best = max(scores.values(), default=0.0)
    close = [key for key in known if scores[key] >= max(0.6, best - 0.05)]
    return sorted(close, key=lambda key: -scores[key])[:limit]


def _likeness(name: str, leaf: str, key: str) -> float:
    """Whole names, and for less the last part where a name has no section; a beginning of the key counts more."""
    match = difflib.SequenceMatcher(None, name, key).ratio() + 0.2 * key.startswith(name)
    if name == leaf:
        match = max(match, 0.9 * difflib.SequenceMatcher(None, leaf, key.rpartition(".")[2]).ratio())
    return match


def suggestion(name: str, known: Iterable[str]) -> str:
    """'; did you mean "x" or "y"?', or nothing."""
    near = nearest(name, known)
    return "; did you mean " + " or ".join(f'"{key}"' for key in near) + "?" if near else ""


def near_multiples(size: int, count: int) -> str:
    """The batch sizes next to `size` of which `count` processes get equal shares, for a person."""
    below = size // count * count
    return " or ".join(str(near) for near in (below, below + count) if near)
