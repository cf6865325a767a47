"""Suggestions for error messages: valid names similar to a wrong one, valid batch sizes. Without torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

SYNONYMS = {
    "learning_rate": "lr", "wd": "schedule.weight_decay", "warmup": "schedule.warmup_ratio",
    "ema": "objective.momentum", "model": "encoder", "arch": "encoder", "model_size": "size", "data": "dataset",
    "data_dir": "dataset.root_path", "root": "dataset.root_path", "img_size": "image_size", "imgsz": "image_size",
    "resolution": "image_size", "dtype": "precision", "amp": "precision", "output_dir": "name",
    "accumulate": "micro_batch_size", "grad_accum": "micro_batch_size", "workers": "num_workers",
    "checkpoint_every": "save_every", "save_period": "save_every",
}  # fmt: skip
"""Names in other programs -> our keys and groups."""


def nearest(name: str, valid: Iterable[str], limit: int = 3) -> list[str]:
    """Valid names that a wrong one may have meant: the same last part, a synonym, or a similar spelling."""
    valid = sorted(set(valid))
    leaf = name.rpartition(".")[2]
    if leaf in valid and leaf != name:
        return [leaf]
    same = [key for key in valid if key.rpartition(".")[2] == leaf and key != name]
    if SYNONYMS.get(leaf) in valid and (leaf == name or not same):
        return [SYNONYMS[leaf]]
    if same:
        return same
    scores = {key: _similarity(name, leaf, key) for key in valid}
    best = max(scores.values(), default=0.0)
    close = [key for key in valid if scores[key] >= max(0.6, best - 0.05)]
    return sorted(close, key=lambda key: -scores[key])[:limit]


def _similarity(name: str, leaf: str, key: str) -> float:
    """Similarity of the whole names, plus 0.2 for a prefix of the key; of the last parts if `name` has no dot."""
    ratio = difflib.SequenceMatcher(None, name, key).ratio() + 0.2 * key.startswith(name)
    if name == leaf:
        ratio = max(ratio, 0.9 * difflib.SequenceMatcher(None, leaf, key.rpartition(".")[2]).ratio())
    return ratio


def suggestion(name: str, valid: Iterable[str]) -> str:
    """'; did you mean "x" or "y"?', or an empty string."""
    near = nearest(name, valid)
    return "; did you mean " + " or ".join(f'"{key}"' for key in near) + "?" if near else ""


def near_multiples(size: int, count: int) -> str:
    """Text with the multiples of `count` next to the batch size `size`, which `count` processes can share equally."""
    below = size // count * count
    return " or ".join(str(near) for near in (below, below + count) if near)
