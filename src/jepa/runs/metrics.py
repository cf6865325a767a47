"""The log files in a run folder: metrics.jsonl, media/, provenance.json. Without torch.

metrics.jsonl has one JSON object per line: `step`, `epoch`, `samples`, then metrics, whose names have a slash. Values
that are not finite are written as null, since JSON has none, and read as nan. A step with training and evaluation has
several lines, which `read_rows` merges.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from jepa.evaluation.types import EmbeddingTable, Evaluation

log = logging.getLogger(__name__)
METRICS, MEDIA, CAPTIONS, PROVENANCE = "metrics.jsonl", "media", "captions.json", "provenance.json"
PACKAGES = ("jepa-train", "torch", "torchvision", "timm", "hydra-core", "omegaconf", "wandb", "numpy", "pillow")
Row = dict[str, float]


class FolderLogger:
    """Logs every run. Entries after `resume_step` are removed first.

    None means a run from step 0; what an earlier attempt without checkpoints has logged is kept in earlier-1, -2 ...
    """

    def __init__(self, *, folder: Path, config: Mapping[str, Any], run_id: str, resume_step: int | None) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        if resume_step is None:
            keep_earlier(self.folder)
        rewind(self.folder, -1 if resume_step is None else resume_step)
        self._lines = (self.folder / METRICS).open("a", encoding="utf-8")
        self._provenance = _provenance(self.folder, config, run_id, resume_step)
        self._write_provenance()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        first = {name: metrics[name] for name in ("epoch", "samples") if name in metrics}
        row = {name: _json_number(value) for name, value in {**first, **metrics}.items()}
        self._lines.write(json.dumps({"step": step} | row) + "\n")
        self._lines.flush()

    def show(self, step: int, evaluation: Evaluation) -> None:
        if evaluation.pictures:
            self._save_pictures(step, evaluation)
        for table in evaluation.tables:
            self._save_table(step, table)

    def close(self, status: str) -> None:
        self._lines.close()
        self._provenance["status"] = status
        self._write_provenance()

    def _save_pictures(self, step: int, evaluation: Evaluation) -> None:
        from PIL import Image  # not needed to read a folder

        folder = self._media_folder(step)
        captions = read_json(folder / CAPTIONS)
        for picture in evaluation.pictures:
            name = file_name(picture.name)
            Image.fromarray(picture.pixels.cpu().numpy()).save(folder / f"{name}.png")
            captions[name] = picture.caption
        write_atomically(folder / CAPTIONS, json.dumps(captions, indent=1))

    def _save_table(self, step: int, table: EmbeddingTable) -> None:
        """Write NAME.npz with vectors [n, D] and labels [n]; only those of step 0 and of the latest step are kept."""
        import numpy as np

        target = self._media_folder(step) / f"{file_name(table.name)}.npz"
        temporary = target.with_suffix(".tmp")
        with temporary.open("wb") as file:
            np.savez(file, vectors=table.vectors.cpu().numpy(), labels=np.array(table.labels, dtype=np.str_))
        os.replace(temporary, target)
        for other in self.folder.glob(f"{MEDIA}/step_*/{target.name}"):
            if step_of(other.parent) not in (0, step):
                other.unlink()

    def _media_folder(self, step: int) -> Path:
        folder = self.folder / MEDIA / f"step_{step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _write_provenance(self) -> None:
        self._provenance["updated"] = time.time()
        write_atomically(self.folder / PROVENANCE, json.dumps(self._provenance, indent=1))


def read_rows(folder: Path) -> list[Row]:
    """Rows of metrics.jsonl in order of their steps, the lines of a step merged, null as nan.

    An incomplete last line, which `kill -9` may leave, is skipped; any other damage raises ValueError.
    """
    rows: dict[int, Row] = {}
    for row in _parse(Path(folder) / METRICS):
        values = {name: math.nan if value is None else value for name, value in row.items()}
        rows.setdefault(row["step"], {}).update(values)
    return [rows[step] for step in sorted(rows)]


def keep_earlier(folder: Path) -> None:
    """Move metrics and media of training steps into a folder of their own, since no checkpoint continues them."""
    steps = [row["step"] for row in _parse(folder / METRICS)]
    if not any(steps):
        return
    number = next(n for n in range(1, 10**6) if not (folder / f"earlier-{n}").exists())
    target = folder / f"earlier-{number}"
    target.mkdir()
    for name in (METRICS, MEDIA):
        if (folder / name).exists():
            (folder / name).rename(target / name)
    log.warning(
        "%s holds metrics up to step %d and no checkpoint: the run starts at step 0, they are kept in %s",
        folder, max(steps), target.name,
    )  # fmt: skip


def rewind(folder: Path, step: int) -> None:
    """Remove all metrics and media after `step`."""
    metrics = folder / METRICS
    if metrics.exists():
        rows = [row for row in _parse(metrics) if row["step"] <= step]
        write_atomically(metrics, "".join(json.dumps(row) + "\n" for row in rows))
    for media in folder.glob(f"{MEDIA}/step_*"):
        if step_of(media) > step:
            shutil.rmtree(media)


def step_of(folder: Path) -> int:
    """The step in the name of a folder under media/."""
    return int(folder.name.removeprefix("step_"))


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that it holds the old or the new text, even if the process is killed."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def read_config(folder: Path) -> dict[str, Any]:
    """config.yaml of a folder; empty if there is none. Raises yaml.YAMLError."""
    path = folder / "config.yaml"
    if not path.exists():
        return {}
    return yaml.load(path.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def file_name(name: str) -> str:
    """`name` as a safe file name: letters, digits, dots, dashes and underscores, with no dot in front."""
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name).lstrip(".") or "unnamed"


def _parse(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON object of each line; none if there is no file."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                return
            raise ValueError(f"{path}, line {number}: not a JSON object, remove the line: {line[:80]!r}") from error
        yield row


def _json_number(value: float) -> float | int | None:
    """A number for JSON; None if it is not finite."""
    number = int(value) if isinstance(value, int) else float(value)
    return number if math.isfinite(number) else None


def _provenance(folder: Path, config: Mapping[str, Any], run_id: str, resume_step: int | None) -> dict[str, Any]:
    """Command, machine, versions and the sessions of the run; a resumed run keeps its earlier sessions."""
    program = Path(sys.argv[0]).name
    command = [*(["python"] if program.endswith(".py") else []), program, *sys.argv[1:]]
    sessions = read_json(folder / PROVENANCE).get("sessions", []) if resume_step is not None else []
    return {
        "name": str(config.get("name", folder.name)),
        "run_id": run_id,
        "status": "running",
        "command": shlex.join(command),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores",
        "versions": {"python": platform.python_version(), **versions()},
        "sessions": [*sessions, {"started": time.time(), "from_step": resume_step or 0}],
    }


def versions() -> dict[str, str]:
    """Package -> installed version."""
    installed = {}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            installed[package] = metadata.version(package)
    return installed
