"""What a store of episodes holds, as a table for the terminal."""

from __future__ import annotations

import numpy as np

from jepa.data.episode_store import EpisodeStore, iterate
from jepa.reports.page import Table

HEADS = ("", "episodes", "steps", "mean return", "terminated", "size", "frames/s")


def summary(store: EpisodeStore, speed: float) -> str:
    """`terminated` is the share of episodes; a `speed` of 0 is none."""
    episodes = list(iterate(store, ("rewards", "terminated")))
    returns = np.array([arrays["rewards"].sum() for arrays in episodes])
    ended = np.array([arrays["terminated"].any() for arrays in episodes])
    size = sum(path.stat().st_size for path in store.folder.rglob("*") if path.is_file())
    cells = (
        str(store.folder), f"{len(store)}", f"{store.lengths.sum()}", f"{returns.mean():.3f}", f"{ended.mean():.3f}",
        f"{size / 1e6:.1f} MB", f"{speed:.0f}" if speed else "-",
    )  # fmt: skip
    return Table(heads=HEADS, rows=[cells]).terminal()
