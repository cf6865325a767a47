"""The README.md of an exported encoder, a model card as the Hugging Face hub reads it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jepa.config.command_rules import MARK
from jepa.exporters.format import ExportFormat, pixel_statistics
from jepa.layers.tokens import token_extent
from jepa.reports.page import Table, bullets
from jepa.reports.run import final_table
from jepa.reports.verdict import initial_weights
from jepa.runs import checkpoint
from jepa.runs.checkpoint import CheckpointError
from jepa.runs.metrics import read_config, read_rows


class Provenance(NamedTuple):
    """How an encoder came about."""

    name: str
    facts: dict[str, str]
    results: str
    """a table in plain text, empty where nothing was measured"""


def history_of(source: str) -> Provenance:
    """What a run folder, or a checkpoint in one, tells about its training; of other sources only their name."""
    try:
        found = checkpoint.find(Path(source))
    except CheckpointError:
        name = Path(source).name if Path(source).exists() else source
        return Provenance(name, {"weights": f"`{name}`"}, "")
    step, config = checkpoint.peek(found)["step"], read_config(found)
    rows = [row for row in read_rows(found.parent.parent) if row["step"] <= step]
    has_probes = any(name.startswith(("probe/", "collapse/")) for row in rows for name in row)
    results = final_table(rows, initial_weights(config)).terminal() if has_probes else ""
    return Provenance(config["name"], _facts(config, step), results)


def _facts(config: Mapping[str, Any], step: int) -> dict[str, str]:
    optimizer, weights = _class(config["optimizer"]), config["encoder"].get("weights")
    began = {} if weights is None else {"began with": weights if weights.startswith("hf:") else Path(weights).name}
    return began | {
        "run": f"`{config['name']}`, step {step:,}, seed {config['seed']}",
        "objective": _class(config["objective"]),
        "mask": _class(config["mask"]),
        "data set": _dataset(config["dataset"]),
        "samples seen": f"{step * config['batch_size']:,} in batches of {config['batch_size']}",
        "optimizer": f"{optimizer}, peak learning rate {config['lr']:g}",
    }


def _class(node: Mapping[str, Any]) -> str:
    return str(node.get("_target_", "-")).rpartition(".")[2]


def _dataset(node: Mapping[str, Any]) -> str:
    """Its kind and name, but no path: the card may be published."""
    parts = node.get("parts")
    if isinstance(parts, Mapping):
        return f"{_class(node)} of {', '.join(_dataset(part) for part in parts.values())}"
    name = node.get("name") or (Path(str(node["path"])).name if node.get("path") else "")
    return f"{_class(node)} {name}".strip()


def card(encoder: Any, form: ExportFormat, history: Provenance, difference: float, repository: str | None) -> str:
    """The text of README.md; `difference` is what the check of parity found, `repository` is where it will be read."""
    there = form.on_hub.format(repository) if repository and form.on_hub else None
    kind = "video" if encoder.clip_shape[1] > 1 else "image"
    mean, std = pixel_statistics(encoder)
    facts = _architecture(encoder) | {"pixel mean": _numbers(mean), "pixel std": _numbers(std)}
    results = f"\nProbes of the frozen encoder at that step, as the run measured them:\n\n```\n{history.results}\n```\n"
    return f"""\
---
library_name: {form.library}
pipeline_tag: {"image-" if kind == "image" else ""}feature-extraction
tags:
- jepa
- self-supervised
---
{MARK}

# {history.name}

A pretrained {kind} encoder without a head, exported by jepa-train: it maps pixels to one vector for each patch.
On random input these vectors differed from those of the encoder that was exported by {difference:.1e} at most.

{_table(facts)}

{bullets(form.notes(encoder))}

## How it was trained

{_table(history.facts)}
{results if history.results else ""}
## Use

{"" if there else "In this folder:"}

```python
{form.snippet(encoder, there or ".")}
```

## Licence

None is stated. Whoever publishes these weights adds `license:` at the top, with regard to the data they are from.
"""


def _architecture(encoder: Any) -> dict[str, str]:
    channels, frames, height, width = encoder.clip_shape
    grid, (patch_frames, *patch) = encoder.grid, token_extent(encoder)
    of_frames = f"{frames} frames of " if frames > 1 else ""
    tubelet = f"{patch_frames} frames of " if patch_frames > 1 else ""
    count = sum(parameter.numel() for parameter in encoder.parameters())
    return {
        "architecture": f"Vision Transformer ({type(encoder).__name__}), depth {len(encoder.blocks)}, "
        f"width {encoder.embed_dim}, {encoder.num_heads} heads, {count / 1e6:.2f} million parameters",
        "input": f"{of_frames}{height} x {width} pixels, {channels} channel{'s' * (channels > 1)}",
        "tokens": f"{grid.t} x {grid.h} x {grid.w}, one for {tubelet}{patch[0]} x {patch[1]} pixels",
        "positions": getattr(getattr(encoder, "positions", None), "kind", "of the architecture"),
    }


def _numbers(values: list[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _table(facts: Mapping[str, str]) -> str:
    return Table(heads=["", ""], rows=list(facts.items()), text_columns={1}).markdown()
