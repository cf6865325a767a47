"""Reinforcement learning: `FeaturesExtractor` for Stable-Baselines3."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jepa.rl.features import FeaturesExtractor

__all__ = ["FeaturesExtractor"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'jepa.rl' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(importlib.import_module("jepa.rl.features"), name)
