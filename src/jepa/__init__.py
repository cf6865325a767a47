"""Train joint embedding predictive architectures: `JEPAConfig`, `JEPAAgent`, `load_encoder` and others."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jepa.agent import JEPAAgent, JEPAConfig, load_encoder, load_finetuned, load_planner, load_world
    from jepa.rl.policy import load_policy

    __version__: str

__all__ = [
    "JEPAAgent", "JEPAConfig", "__version__", "load_encoder", "load_finetuned", "load_planner", "load_policy",
    "load_world",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "worlds":
        return importlib.import_module("jepa.worlds")
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("jepa-train")
    if name not in __all__:
        raise AttributeError(f"module 'jepa' has no attribute {name!r}; it offers {', '.join(__all__)}")
    home = "jepa.rl.policy" if name == "load_policy" else "jepa.agent"
    return getattr(importlib.import_module(home), name)
