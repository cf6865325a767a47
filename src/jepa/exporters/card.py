"""The README.md of an exported encoder: a model card for the Hugging Face hub."""

from __future__ import annotations

import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from jepa.config.command_rules import MARK
from jepa.config.files import Fields
from jepa.exporters.format import ExportFormat, pixel_statistics
from jepa.layers.tokens import token_extent
from jepa.reports.page import Table, bullets, escape_markdown
from jepa.reports.run import final_table
from jepa.reports.verdict import initial_weights
from jepa.runs import checkpoint
from jepa.runs.checkpoint import CheckpointError
from jepa.runs.metrics import read_config, read_rows
from jepa.runs.metrics import read_provenance as read_provenance_file

CARD_FIELDS: Fields = {
    "name": str, "seed": int, "batch_size": int, "lr": float,
    **dict.fromkeys(("encoder", "mask", "objective", "dataset", "optimizer"), dict),
}  # fmt: skip
"""Fields of a configuration that the card shows."""


MAX_CLASSES = 20
"""Classes that the card names."""


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
    state, config = checkpoint.peek(folder), read_config(folder, CARD_FIELDS)
    step = state["step"]
    rows = [row for row in read_rows(folder.parent.parent) if row["step"] <= step]
    has_probes = any(name.startswith(("probe/", "collapse/")) for row in rows for name in row)
    results = final_table(rows, initial_weights(config)).terminal() if has_probes else ""
    facts = _facts(config, step, state.get("data") or {}) | _origin(read_provenance_file(folder.parent.parent))
    return Provenance(config["name"], facts, results)


def _origin(provenance: Mapping[str, Any]) -> dict[str, str]:
    """Date, device and versions of the training."""
    sessions, versions = provenance.get("sessions") or (), provenance.get("versions", {})
    days = [time.strftime("%Y-%m-%d", time.gmtime(session["started"])) for session in sessions[:1]]
    device = f", on {provenance['device']}" if provenance.get("device") else ""
    names = ", ".join(f"{name} {version}" for name, version in versions.items())
    return ({"trained": f"begun {days[0]}{device}"} if days else {}) | ({"versions": names} if names else {})


def _facts(config: Mapping[str, Any], step: int, data: Mapping[str, Any]) -> dict[str, str]:
    facts, weights = {}, config["encoder"].get("weights")
    if weights is not None:
        facts["initial weights"] = weights if str(weights).startswith("hf:") else Path(str(weights)).name
    return facts | {
        "run": f"`{config['name']}`, step {step:,}, seed {config['seed']}",
        "objective": _class(config["objective"]),
        "mask": _class(config["mask"]),
        "data set": _dataset(config["dataset"]) + _contents(data),
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


def _contents(data: Mapping[str, Any]) -> str:
    """Number of samples and names of the classes, as a checkpoint has them."""
    names = list(map(escape_markdown, data.get("classes") or ()))
    shown = ", ".join([*names[:MAX_CLASSES], *["..."] * (len(names) > MAX_CLASSES)])
    samples = f": {data['num_samples']:,} samples" if "num_samples" in data else ""
    return samples + (f" in {len(names):,} classes ({shown})" if names else "")


def card(encoder: Any, format: ExportFormat, provenance: Provenance, difference: float, repository: str | None) -> str:
    """Text of README.md; `difference` is the largest of the tokens, `repository` the target on the hub."""
    hub_source = format.on_hub.format(repository) if repository and format.on_hub else None
    kind = "video" if encoder.clip_shape[1] > 1 else "image"
    statistics = zip(("pixel mean", "pixel std"), pixel_statistics(encoder), strict=True)
    facts = _architecture(encoder) | {name: ", ".join(f"{x:g}" for x in values) for name, values in statistics}
    release = version("jepa-train")
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

A pretrained {kind} encoder without a head, exported by jepa-train {release}: it maps pixels to one vector for each
patch. On random input these vectors differ by at most {difference:.1e} from those of the original encoder.

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
