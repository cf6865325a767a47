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
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from jepa.config import changed_keys, files
from jepa.errors import FileError
from jepa.types import Within

if TYPE_CHECKING:
    from jepa.evaluation.types import EmbeddingTable, Evaluation

log = logging.getLogger(__name__)
METRICS, MEDIA, CAPTIONS, PROVENANCE = "metrics.jsonl", "media", "captions.json", "provenance.json"
PROTOCOL = "protocol.txt"
"""How the probes of a run measure, a line for each."""
PACKAGES = ("jepa-train", "torch", "torchvision", "timm", "hydra-core", "omegaconf", "wandb", "numpy", "pillow")
Row = dict[str, float]
RUN_FIELDS: files.Fields = dict.fromkeys(("run_id", "status", "message"), str | None)
"""Fields of run.json."""
SECTIONS = ("encoder", "mask", "objective", "dataset", "optimizer", "regularizer", "evaluator", "logger")
CONFIG_FIELDS: files.Fields = {"name": str | None, "seed": int | None, **dict.fromkeys(SECTIONS, dict | None)}
"""Fields of config.yaml that are read; the others are only shown and compared."""
PROVENANCE_FIELDS: files.Fields = {
    **dict.fromkeys(("name", "status", "command", "machine", "device"), str | None),
    "versions": Mapping[str, str] | None,
    "sessions": list[dict] | None,
}
"""Fields of provenance.json that are read."""
SESSION_FIELDS: files.Fields = {"started": Annotated[float, Within(0, 1e10)], "from_step": int}
"""Fields of a session in provenance.json; `started` is in seconds since 1970."""


class FolderLogger:
    """Logs every run. Entries after `resume_step` are removed first.

    None means a run from step 0; what an earlier attempt without checkpoints has logged is kept in earlier-1, -2 ...
    """

    def __init__(
        self, *, folder: Path, config: Mapping[str, Any], run_id: str, resume_step: int | None, device: str = ""
    ) -> None:  # fmt: skip
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        if resume_step is None:
            keep_earlier(self.folder)
        rewind(self.folder, -1 if resume_step is None else resume_step)
        self._lines = (self.folder / METRICS).open("a", encoding="utf-8")
        self._provenance = _provenance(self.folder, config, run_id, resume_step) | {"device": device}
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
        captions = read_captions(folder)
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
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or f"{error}", path) from error  # a failed write names no file


def read_json(path: Path, fields: files.Fields | None = None) -> dict[str, Any]:
    """The mapping in a JSON file, as `jepa.config.files.read_json`; empty if there is no file."""
    return files.read_json(path, fields) if files.exists(path) else {}


def read_config(folder: Path, fields: files.Fields | None = None) -> dict[str, Any]:
    """config.yaml of a folder, as `jepa.config.files.read_yaml`; empty if there is none."""
    path = folder / "config.yaml"
    return files.read_yaml(path, {**CONFIG_FIELDS, **(fields or {})}) if files.exists(path) else {}


def clock(rows: Iterable[Mapping[str, float]]) -> list[tuple[float, float, float]]:
    """(step, samples seen, seconds of training) from the measured rates, without pauses and interruptions."""
    points = [(0.0, 0.0, 0.0)]
    for row in rows:
        rate = row.get("perf/samples_per_s", math.nan)
        if rate > 0 and math.isfinite(rate) and "samples" in row:
            _, before, seconds = points[-1]
            points.append((row["step"], row["samples"], seconds + (row["samples"] - before) / rate))
    return points


def read_ending(folder: Path) -> dict[str, str]:
    """run.json of a run folder: run_id, status and message; empty if there is none."""
    stored = read_json(folder / "run.json", RUN_FIELDS)
    return {name: value for name, value in stored.items() if value is not None}


def is_finished(folder: Path, config: Mapping[str, Any]) -> bool:
    """True if the run in the folder is finished and has this configuration."""
    return read_ending(folder).get("status") == "finished" and not changed_keys(read_config(folder), config)


def read_provenance(folder: Path) -> dict[str, Any]:
    """provenance.json of a run folder; empty if there is none."""
    try:
        stored = read_json(folder / PROVENANCE, PROVENANCE_FIELDS)
        for number, session in enumerate(stored.get("sessions") or ()):
            files.as_mapping(session, f"{folder / PROVENANCE}: sessions[{number}]", SESSION_FIELDS)
    except FileError as error:
        raise FileError(f"{error}; remove that file, which is a record of the sessions and not needed") from error
    return {name: value for name, value in stored.items() if value is not None}


def read_captions(folder: Path) -> dict[str, str]:
    """Captions of the pictures in a folder of media; empty if there are none."""
    path = folder / CAPTIONS
    captions = read_json(path)
    return files.as_mapping(captions, path, dict.fromkeys(captions, str))


def file_name(name: str) -> str:
    """`name` as a safe file name: letters, digits, dots, dashes and underscores, with no dot in front."""
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name).lstrip(".") or "unnamed"


def _parse(path: Path) -> Iterator[dict[str, Any]]:
    """The row of each line; none if there is no file."""
    lines = files.read_bytes(path, None).splitlines() if files.exists(path) else []
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        try:
            row = files.parse_json(line, where, is_checked=False)
        except FileError as error:
            if number == len(lines):
                return
            raise FileError(f"{where}: not a JSON object, remove the line: {line[:80]!r}") from error
        if not _is_row(row):
            raise FileError(f"{where}: not a row with a step and numbers, remove the line: {line[:80]!r}")
        yield row


def _is_row(row: Any) -> bool:
    """True for {"step": 3, name: number or null, ...}."""
    if not isinstance(row, dict) or type(row.get("step")) is not int or not 0 <= row["step"] < files.MAX_INTEGER:
        return False
    kinds = set(map(type, row.values()))
    return kinds <= {int, float, type(None)} and all(abs(v) < files.MAX_INTEGER for v in row.values() if type(v) is int)


def _json_number(value: float) -> float | int | None:
    """A number for JSON; None if it is not finite."""
    number = int(value) if isinstance(value, int) else float(value)
    return number if math.isfinite(number) else None


def _provenance(folder: Path, config: Mapping[str, Any], run_id: str, resume_step: int | None) -> dict[str, Any]:
    """Command, machine, versions and the sessions of the run; a resumed run keeps its earlier sessions."""
    sessions = read_provenance(folder).get("sessions", []) if resume_step is not None else []
    return {
        "name": str(config.get("name", folder.name)), "run_id": run_id, "status": "running",
        "command": shlex.join(_command(folder, config)),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores",
        "versions": {"python": platform.python_version(), **versions()},
        "sessions": [*sessions, {"started": time.time(), "from_step": resume_step or 0}],
    }  # fmt: skip


def _command(folder: Path, config: Mapping[str, Any]) -> list[str]:
    """The command that runs it again: that which was typed, or one with config.yaml where another program ran it."""
    program = Path(sys.argv[0]).stem.removeprefix("jepa-")
    if program in ("train", "finetune") or (program == "rl" and "policy_steps" in config):
        return [f"jepa-{program}", *sys.argv[1:]]
    return ["jepa-train", "--config-dir", str(folder), "--config-name", "config"]


def versions() -> dict[str, str]:
    """Package -> installed version."""
    installed = {}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            installed[package] = metadata.version(package)
    return installed
