"""jepa-embed: the features of a folder of files as one table, and the files that look like a picture."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from jepa.cli.overrides import run_overrides
from jepa.cli.terminal import quick_imports, setup_logging

HEAD = """\
jepa-embed writes the features of files: one row for each file, with its name.

usage: jepa-embed run=SOURCE images=FOLDER out=FILE [key=value ...] [flags]

  jepa-embed run=outputs/x images=photos out=features.parquet
  jepa-embed run=outputs/x videos=clips out=features.npz readout=steps
  jepa-embed run=timm:vit_small_patch16_224.dino images=photos out=tokens.safetensors readout=all    all tokens
  jepa-embed run=outputs/x dataset=cifar10 part=validation out=cifar10.parquet      with the names of the classes
  jepa-embed run=outputs/x out=features.parquet like=cat.jpg page=cats.html         the nearest files, by cosine

run: a run or checkpoint of jepa-train, an exported folder, published I-JEPA and V-JEPA files, a folder of transformers,
timm:NAME, hf:ORG/NAME. Size and normalisation are those of its training. A command that was stopped goes on where it
was, and ends with the same file. Files that cannot be read are named, also in the file of features."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 if it failed, 2 for an error in the arguments, 130 after Ctrl-C."""
    return run_overrides("embed", _embed, arguments, head=HEAD)


def _embed(overrides: Sequence[str], config_dir: str | None) -> int:
    from jepa.config import compose_embed

    config = compose_embed(overrides, config_dir)
    setup_logging()
    with quick_imports(config):
        from jepa.inference.embed import Embedding
        from jepa.inference.neighbour_page import write_neighbour_page
        from jepa.reports.page import Table

    embedding = Embedding(config)
    if config.images or config.videos or config.dataset:
        print(embedding.write(), flush=True)
    if config.like is None:
        return 0
    found = embedding.neighbours(config.like)
    rows = [[name, f"{cosine:.4f}"] for name, cosine in zip(found.names, found.cosines, strict=True)]
    print(Table(heads=["nearest files", "cosine"], rows=rows).terminal(), flush=True)
    if config.page:
        write_neighbour_page(Path(config.page).expanduser(), config.like, found)
        print(f"page: {config.page}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
