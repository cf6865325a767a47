"""Train joint embedding predictive architectures: `JEPAConfig`, `JEPAAgent`, `load_encoder`, `load_world`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jepa.agent import JEPAAgent, JEPAConfig, load_encoder, load_planner, load_world

__all__ = ["JEPAAgent", "JEPAConfig", "load_encoder", "load_planner", "load_world"]


def __getattr__(name: str) -> Any:
    if name == "worlds":
        return importlib.import_module("jepa.worlds")
    if name not in __all__:
        raise AttributeError(f"module 'jepa' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(importlib.import_module("jepa.agent"), name)
