"""Reads the transaction log that W&B keeps offline: a LevelDB log (32 KiB blocks) of protobuf records."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import wandb
from wandb.proto import wandb_internal_pb2

BLOCK, HEADER = 32768, 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


@dataclass
class OfflineRun:
    run_id: str = ""
    project: str = ""
    config: dict = field(default_factory=dict)
    rows: dict[int, dict] = field(default_factory=dict)
    summary: dict = field(default_factory=dict)
    exit_code: int | None = None
    artifact_files: dict[str, Path] = field(default_factory=dict)


def read_offline_runs(folder: Path) -> list[OfflineRun]:
    """The runs below folder/wandb, after W&B's own process has written what it still holds."""
    wandb.teardown()
    return [_read(path) for path in sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"))]


def _read(path: Path) -> OfflineRun:
    run = OfflineRun()
    for raw in _records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(raw)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run.run_id, run.project = record.run.run_id, record.run.project
            run.config |= _values(record.run.config.update)
        elif kind == "history":
            run.rows.setdefault(record.history.step.num, {}).update(_values(record.history.item))
        elif kind == "summary":
            run.summary |= _values(record.summary.update)
        elif kind == "exit":
            run.exit_code = record.exit.exit_code
        elif kind == "artifact":
            run.artifact_files |= {e.path: Path(e.local_path) for e in record.artifact.manifest.contents}
    return run


def _values(items: list) -> dict:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def _records(data: bytes) -> Iterator[bytes]:
    """Whole records; ends quietly where the file is cut off."""
    assert data[:4] == b":W&B", data[:4]
    place, parts = HEADER, b""
    while place + HEADER <= len(data):
        if BLOCK - place % BLOCK < HEADER:
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + HEADER])
        body = data[place + HEADER : place + HEADER + length]
        if len(body) < length or kind not in (FULL, FIRST, MIDDLE, LAST):
            return
        place += HEADER + length
        parts = body if kind in (FULL, FIRST) else parts + body
        if kind in (FULL, LAST):
            yield parts
