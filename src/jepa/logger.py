"""Where a run is told besides its folder: Weights & Biases and TensorBoard behind one protocol (types.Logger)."""

from __future__ import annotations

import json
import logging
import netrc
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import urlsplit

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from jepa.evaluation.types import EmbeddingTable, Evaluation

EXIT_CODES = {"finished": 0, "failed": 1, "stopped": 255}
"""255 is what W&B shows as killed."""
TIMEOUTS = {"init_timeout": 20, "login_timeout": 10, "finish_timeout": 60}
QUIET = {"console": "off", "silent": True, "disable_git": True}
LOST_ON_KILL = {"x_transaction_log_flush_interval": 1.0}
"""seconds of rows that kill -9 may take; 15 by default"""
log = logging.getLogger(__name__)


class WandbLogger:
    """Weights & Biases, as the run `run_id`, with its files in FOLDER/wandb.

    `mode` null follows WANDB_MODE, else it is online where a key is configured and offline where none is. It never
    prompts. When the service cannot be reached, or is lost later, a warning says so and the training goes on.
    """

    def __init__(
        self, *, project: str, entity: str | None,
        mode: Annotated[str, Literal["online", "offline", "disabled"]] | None,
        folder: Path, config: Mapping[str, Any], run_id: str, resume_step: int | None,
    ) -> None:  # fmt: skip
        if not re.fullmatch(r"[\w.-]{1,128}", run_id):
            raise ValueError(f"run_id={run_id!r}: at most 128 letters, digits, dots, dashes and underscores")
        self.folder = Path(folder).resolve()
        # W&B's report on itself: seconds of imports at the first row, and it asks the network in an offline run too
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        mode = mode or os.environ.get("WANDB_MODE") or ("online" if _has_key() else "offline")
        if mode == "online" and not _has_key():
            log.warning("W&B: no key is configured (wandb login), so this run is kept offline")
            mode = "offline"
        self._run = None
        if mode != "disabled":
            identity = {"project": project, "entity": entity, "id": run_id, "name": str(config.get("name", run_id))}
            self._run = _start(mode, self.folder, identity, config)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._send(step, dict(metrics), commit=False)

    def show(self, step: int, evaluation: Evaluation) -> None:
        """Also completes the row of this step, which W&B would hold back until a later one."""
        if self._run is None:
            return
        import wandb

        pictures = {
            f"pictures/{picture.name}": wandb.Image(picture.pixels.cpu().numpy(), caption=picture.caption or None)
            for picture in evaluation.pictures
        }
        with _staged_in(self.folder / "wandb" / "data"):
            tables = {f"tables/{t.name}": _wandb_table(t) for t in evaluation.tables}
            self._send(step, pictures | tables, commit=True)

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Cells of text or numbers, as the table NAME; completes the row of this step."""
        import wandb

        with _staged_in(self.folder / "wandb" / "data"):
            self._send(step, {name: wandb.Table(columns=list(columns), data=[list(row) for row in rows])}, commit=True)

    def close(self, status: str) -> None:
        if self._run is None:
            return
        with self._surviving():
            self._run.summary["status"] = status
            self._run.finish(exit_code=EXIT_CODES[status])
        self._run = None

    def _send(self, step: int, values: dict[str, Any], commit: bool) -> None:
        if self._run is not None:
            with self._surviving():
                self._run.log(values, step=step, commit=commit)

    @contextmanager
    def _surviving(self) -> Iterator[None]:
        """Losing W&B's own process ends the logging to it, with a warning, and not the training."""
        import wandb

        try:
            yield
        except (ConnectionError, wandb.Error) as error:
            self._run = None
            log.warning("W&B was lost (%s): nothing more is sent to it; metrics.jsonl and report.html go on", error)


def _start(mode: Any, folder: Path, identity: dict[str, Any], config: Mapping[str, Any]) -> Any:
    import wandb

    folder.mkdir(parents=True, exist_ok=True)
    watched = mode == "online"
    wanted = QUIET | TIMEOUTS | LOST_ON_KILL | {"x_disable_stats": not watched, "x_disable_machine_info": not watched}
    known: dict[str, Any] = {name: value for name, value in wanted.items() if name in wandb.Settings.model_fields}
    arguments = identity | {"dir": str(folder), "config": dict(config), "resume": "allow"}
    try:
        run = wandb.init(mode=mode, settings=wandb.Settings(**known), **arguments)
    except wandb.Error as error:
        if mode == "offline":
            place = folder / "wandb"
            raise RuntimeError(f"W&B could not write to {place}: {error}; logger=none does without it") from error
        log.warning("W&B cannot be reached (%s): this run is kept offline", error)
        wandb.teardown()  # its process would refuse a second run of the same id
        run = wandb.init(mode="offline", settings=wandb.Settings(**known), **arguments)
    if run.settings.mode == "online":
        log.info("W&B: %s", run.url)
    else:
        log.info("W&B: offline; to send it later: wandb sync %s", run.settings.sync_dir)
    return run


def _has_key() -> bool:
    """Whether W&B finds a key without asking: in the environment or in the netrc file."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    import wandb

    hosts = {urlsplit(wandb.setup().settings.base_url).netloc, "api.wandb.ai"}
    places = [os.environ.get("NETRC"), "~/.netrc", "~/_netrc"]
    for place in (Path(p).expanduser() for p in places if p):
        try:
            found = netrc.netrc(place).hosts
        except FileNotFoundError:
            continue
        except (OSError, netrc.NetrcParseError) as error:
            log.warning("W&B: %s cannot be read (%s), so no key is taken from it", place, error)
            continue
        if hosts & set(found):
            return True
    return False


@contextmanager
def _staged_in(place: Path) -> Iterator[None]:
    """Thumbnails of a table are staged in the home directory otherwise, and lost when the run folder moves."""
    name, given = "WANDB_DATA_DIR", os.environ.get("WANDB_DATA_DIR")
    os.environ[name] = given or str(place)
    try:
        yield
    finally:
        if given is None:
            del os.environ[name]


def _wandb_table(table: EmbeddingTable) -> Any:
    """Rows of thumbnail, label and embedding, for W&B's 2D projector."""
    import wandb

    vectors = table.vectors.cpu().numpy().astype(np.float64).round(4)  # float32 would be printed with 17 digits
    thumbnails = _rgb(table.thumbnails).permute(0, 2, 3, 1).cpu().numpy()  # [n, h, w, 3]
    rows = zip(map(wandb.Image, thumbnails), table.labels, vectors, strict=True)
    sent = wandb.Table(columns=["thumbnail", "label", "embedding"], data=[list(row) for row in rows])
    sent._MAX_EMBEDDING_DIMENSIONS = vectors.shape[1]  # wider arrays would be taken out of the table, into an npz
    return sent


def _rgb(pictures: Tensor) -> Tensor:
    """uint8 [n, C, h, w] -> [n, 3, h, w]; of other channel counts the first channel is shown."""
    return pictures if pictures.shape[1] == 3 else pictures[:, :1].expand(-1, 3, -1, -1)


class TensorboardLogger:
    """TensorBoard, in FOLDER/tensorboard: scalars, images, and the embedding projector."""

    def __init__(self, *, folder: Path, config: Mapping[str, Any], run_id: str, resume_step: int | None) -> None:
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ModuleNotFoundError as error:
            raise ValueError("logger=tensorboard needs an extra: pip install 'jepa-train[tensorboard]'") from error
        first = 0 if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(str(Path(folder) / "tensorboard"), purge_step=first)
        if resume_step is None:
            self._writer.add_text("config", f"run {run_id}\n\n```\n{json.dumps(dict(config), indent=1)}\n```", 0)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, float(value), step)
        self._writer.flush()

    def show(self, step: int, evaluation: Evaluation) -> None:
        for picture in evaluation.pictures:
            self._writer.add_image(f"pictures/{picture.name}", picture.pixels, step, dataformats="HWC")
        for table in evaluation.tables:
            thumbnails = _rgb(table.thumbnails).float() / 255
            self._writer.add_embedding(table.vectors, list(table.labels), thumbnails, step, tag=table.name)
        self._writer.flush()

    def close(self, status: str) -> None:
        self._writer.close()
