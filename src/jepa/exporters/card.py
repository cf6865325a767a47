"""The README.md of an exported encoder: a model card for the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jepa.config.command_rules import MARK
from jepa.config.files import Fields
from jepa.exporters.format import ExportFormat, pixel_statistics
from jepa.layers.tokens import token_extent
from jepa.reports.page import Table, bullets
from jepa.reports.run import final_table
from jepa.reports.verdict import initial_weights
from jepa.runs import checkpoint
from jepa.runs.checkpoint import CheckpointError
from jepa.runs.metrics import read_config, read_rows

CARD_FIELDS: Fields = {
    "name": str, "seed": int, "batch_size": int, "lr": float,
    **dict.fromkeys(("encoder", "mask", "objective", "dataset", "optimizer"), dict),
}  # fmt: skip
"""Fields of a configuration that the card shows."""


class Provenance(NamedTuple):
    """How an encoder was trained."""

    name: str
    facts: dict[str, str]
    results: str
    """Table of metrics in plain text; empty if none were measured."""


def read_provenance(source: str) -> Provenance:
    """Provenance from a run folder or a checkpoint in one; for other sources only their name."""
    try:
        folder = checkpoint.find(Path(source))
    except CheckpointError:
        name = Path(source).name if Path(source).exists() else source
        return Provenance(name, {"weights": f"`{name}`"}, "")
    step, config = checkpoint.peek(folder)["step"], read_config(folder, CARD_FIELDS)
    rows = [row for row in read_rows(folder.parent.parent) if row["step"] <= step]
    has_probes = any(name.startswith(("probe/", "collapse/")) for row in rows for name in row)
    results = final_table(rows, initial_weights(config)).terminal() if has_probes else ""
    return Provenance(config["name"], _facts(config, step), results)


def _facts(config: Mapping[str, Any], step: int) -> dict[str, str]:
    facts, weights = {}, config["encoder"].get("weights")
    if weights is not None:
        facts["initial weights"] = weights if str(weights).startswith("hf:") else Path(str(weights)).name
    return facts | {
        "run": f"`{config['name']}`, step {step:,}, seed {config['seed']}",
        "objective": _class(config["objective"]),
        "mask": _class(config["mask"]),
        "data set": _dataset(config["dataset"]),
        "samples seen": f"{step * config['batch_size']:,} in batches of {config['batch_size']}",
        "optimizer": f"{_class(config['optimizer'])}, peak learning rate {config['lr']:g}",
    }


def _class(node: Mapping[str, Any]) -> str:
    return str(node.get("_target_", "-")).rpartition(".")[2]


def _dataset(node: Mapping[str, Any]) -> str:
    """Class and name of the data set, without a path, since the card may be published."""
    parts = node.get("parts")
    if isinstance(parts, Mapping):
        named = (_dataset(part) for part in parts.values() if isinstance(part, Mapping))
        return f"{_class(node)} of {', '.join(named)}"
    name = node.get("name") or (Path(str(node["path"])).name if node.get("path") else "")
    return f"{_class(node)} {name}".strip()


def card(encoder: Any, format: ExportFormat, provenance: Provenance, difference: float, repository: str | None) -> str:
    """Text of README.md; `difference` is the largest of the tokens, `repository` the target on the hub."""
    hub_source = format.on_hub.format(repository) if repository and format.on_hub else None
    kind = "video" if encoder.clip_shape[1] > 1 else "image"
    statistics = zip(("pixel mean", "pixel std"), pixel_statistics(encoder), strict=True)
    facts = _architecture(encoder) | {name: ", ".join(f"{x:g}" for x in values) for name, values in statistics}
    results = f"\nProbes of the frozen encoder at that step, from the run:\n\n```\n{provenance.results}\n```\n"
    return f"""\
---
library_name: {format.library}
pipeline_tag: {"image-" if kind == "image" else ""}feature-extraction
tags:
- jepa
- self-supervised
---
{MARK}

# {provenance.name}

A pretrained {kind} encoder without a head, exported by jepa-train: it maps pixels to one vector for each patch.
On random input these vectors differ by at most {difference:.1e} from those of the original encoder.

{_table(facts)}

{bullets(format.notes(encoder))}

## How it was trained

{_table(provenance.facts)}
{results if provenance.results else ""}
## Use

{"" if hub_source else "In this folder:"}

```python
{format.snippet(encoder, hub_source or ".")}
```

## Licence

None is stated. Before you publish these weights, add `license:` at the top; consider the licence of the training data.
"""


def _architecture(encoder: Any) -> dict[str, str]:
    channels, frames, height, width = encoder.clip_shape
    grid, (patch_frames, *patch) = encoder.grid, token_extent(encoder)
    clip = f"{frames} frames of " if frames > 1 else ""
    tubelet = f"{patch_frames} frames of " if patch_frames > 1 else ""
    count = sum(parameter.numel() for parameter in encoder.parameters())
    return {
        "architecture": f"Vision Transformer ({type(encoder).__name__}), depth {len(encoder.blocks)}, "
        f"width {encoder.embed_dim}, {encoder.num_heads} heads, {count / 1e6:.2f} million parameters",
        "input": f"{clip}{height} x {width} pixels, {channels} channel{'s' * (channels > 1)}",
        "tokens": f"{grid.t} x {grid.h} x {grid.w}, one for {tubelet}{patch[0]} x {patch[1]} pixels",
        "positions": getattr(getattr(encoder, "positions", None), "kind", "of the architecture"),
    }


def _table(facts: Mapping[str, str]) -> str:
    return Table(heads=["", ""], rows=list(facts.items()), text_columns={1}).markdown()
