"""The encoder of a run, or its architecture with fresh weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jepa import checkpoint
from jepa.checkpoint import CheckpointError
from jepa.config import factory
from jepa.data.transforms import EvalTransform


def open_encoder(source: str, *, clip_shape: Sequence[int] | None = None, fresh: bool = False) -> Any:
    """In eval mode, on the CPU, with its `transform`; `clip_shape` is other than the one it was trained on."""
    found = checkpoint.find(Path(source))
    state, node = checkpoint.read_state(found), checkpoint.read_config(found)["encoder"]
    if not str(node.get("_target_")).startswith("jepa.encoders."):
        raise CheckpointError(f"{found}: encoder {node.get('_target_')} is not one of jepa.encoders")
    encoder = factory(node)(clip_shape=tuple(clip_shape or state["clip_shape"]))
    if not fresh:
        encoder.load_state_dict(checkpoint.load_model(found, state["backbone"] + "."))
    encoder.transform = EvalTransform(image_size=encoder.clip_shape[2:], mean=state["mean"], std=state["std"])
    return encoder.eval()
