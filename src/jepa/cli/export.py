"""jepa-export: gives a trained encoder to timm, transformers, ONNX or torch.export, checked against our own."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from contextlib import suppress

from jepa.cli.terminal import outcome, quick_imports
from jepa.config.catalogue import conf_folder

EPILOG = """\
examples
  jepa-export run=outputs/x                            for jepa.load_encoder, without the rest of the run
  jepa-export run=outputs/x format=timm                timm.create_model("local-dir:...", pretrained=True)
  jepa-export run=outputs/x format=transformers        AutoModel.from_pretrained("outputs/x/export/transformers")
  jepa-export run=outputs/x/checkpoints/best format=onnx output=deploy
  jepa-export run=outputs/x format=timm push_to_hub=me/my-encoder

Each writes a folder with a model card, checks that it computes what the encoder computes, and prints a program that
loads it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0, 1 where an export has failed, 2 for what is refused, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        "jepa-export",
        description=f"{__doc__}\n\n{_keys()}",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="what to export, and how")
    flags = parser.parse_args(arguments)
    return outcome("jepa-export", lambda: _export(flags.overrides))


def _keys() -> str:
    """The keys of conf/export.yaml, each with its default and meaning."""
    text = (conf_folder() / "export.yaml").read_text()
    found = re.findall(r"^(\w+): +(\S+) +# (.*)$", text, re.MULTILINE)
    return "\n".join(["keys, with their defaults", *(f"  {f'{key}={value}':<22} {why}" for key, value, why in found)])


def _export(overrides: Sequence[str]) -> int:
    from jepa.config import compose_export

    config = compose_export(overrides)
    with quick_imports():
        from jepa.exporters.export import export_encoder, push_to_hub
    from jepa.config.command_rules import output_folder

    folder = output_folder(config.run, config.format, config.output)
    assert folder is not None  # the rules have refused it
    done = export_encoder(config.run, config.format, folder, repository=config.push_to_hub)
    files = ", ".join(f"{name} ({_size(size)})" for name, size in done.files.items())
    parity = f"largest difference {done.difference:.1e}, of values up to {done.largest:.2f}"
    with suppress(BrokenPipeError):  # a pager or `head` that has seen enough
        print(
            f"{done.folder}: {files}\nthe same as our encoder on random input: {parity}\n\n{done.snippet}", flush=True
        )
    if config.push_to_hub:
        print(f"\n{push_to_hub(done.folder, config.push_to_hub)}")
    return 0


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


if __name__ == "__main__":
    sys.exit(main())
