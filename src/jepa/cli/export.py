"""jepa-export: writes a trained encoder for timm, transformers, ONNX or torch.export and checks its output."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress

from jepa.cli.overrides import run_overrides
from jepa.cli.terminal import quick_imports

HEAD = """\
jepa-export writes a trained encoder for timm, transformers, ONNX or torch.export and checks its output.

usage: jepa-export run=RUN [format=FORMAT] [key=value ...] [flags]

  jepa-export run=outputs/x                            for jepa.load_encoder, without the rest of the run
  jepa-export run=outputs/x format=timm                timm.create_model("local-dir:...", pretrained=True)
  jepa-export run=outputs/x format=transformers        AutoModel.from_pretrained("outputs/x/export/transformers")
  jepa-export run=outputs/x/checkpoints/best format=onnx output=deploy
  jepa-export run=outputs/x format=timm push_to_hub=me/my-encoder

Each command writes a folder with a model card, checks that the exported encoder computes the same tokens, and prints a
program that loads it. timm and transformers have models of encoder.stem=linear only."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 if the export failed, 2 for an error in the arguments, 130 after Ctrl-C."""
    return run_overrides("export", _export, arguments, head=HEAD, stopped="stopped")


def _export(overrides: Sequence[str], config_dir: str | None) -> int:
    from jepa.config import compose_export

    config = compose_export(overrides, config_dir)
    with quick_imports(config):
        from jepa.exporters.export import export_encoder, push_to_hub
    from jepa.config.command_rules import output_folder
    from jepa.config.heads import head_of, stored_config

    folder = output_folder(config.run, config.format, config.output)
    assert folder is not None  # compose_export raises otherwise
    export = export_encoder(config.run, config.format, folder, repository=config.push_to_hub)
    files = ", ".join(f"{path.name} ({_size(path.stat().st_size)})" for path in sorted(export.folder.iterdir()))
    parity = f"largest difference of tokens {export.difference:.1e}, of values up to {export.largest:.2f}"
    with suppress(BrokenPipeError):  # the reader of the pipe, such as `head`, has closed it
        print(f"{export.folder}: {files}\nchecked on random input: {parity}\n\n{export.snippet}", flush=True)
    if head := head_of(stored_config(config.run)):
        print(f"\nnot exported: the head of the run ({head}); jepa-predict run={config.run} uses it")
    if config.push_to_hub:
        print(f"\n{push_to_hub(export.folder, config.push_to_hub)}")
    return 0


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


if __name__ == "__main__":
    sys.exit(main())
