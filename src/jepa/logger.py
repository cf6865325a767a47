"""Loggers beside the run folder: Weights & Biases and TensorBoard, with the protocol evaluation.types.Logger."""

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
"""Status of a run -> exit code for W&B, which shows 255 as killed."""
SECONDS = {"init_timeout": 20, "login_timeout": 10, "finish_timeout": 60, "x_transaction_log_flush_interval": 1.0}
"""Times in W&B's settings; `kill -9` loses the rows of the last flush interval, which is 15 s by default."""
QUIET = {"console": "off", "silent": True, "disable_git": True}
log = logging.getLogger(__name__)


class WandbLogger:
    """Logs to Weights & Biases as the run `run_id`, with files in FOLDER/wandb.

    With `mode` null, WANDB_MODE decides, else the run is online if an API key is configured and offline if not. There
    are no prompts. If the service fails, at the start or later, a warning is logged and the training continues.
    """

    def __init__(
        self, *, project: str, entity: str | None,
        mode: Annotated[str, Literal["online", "offline", "disabled"]] | None,
        folder: Path, config: Mapping[str, Any], run_id: str, resume_step: int | None,
    ) -> None:  # fmt: skip
        if not re.fullmatch(r"[\w.-]{1,128}", run_id):
            raise ValueError(f"run_id={run_id!r}: at most 128 letters, digits, dots, dashes and underscores")
        self.folder = Path(folder).resolve()
        # W&B's error reporting costs seconds of imports at the first row, and uses the network even in an offline run
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        mode = mode or os.environ.get("WANDB_MODE") or ("online" if _has_key() else "offline")
        if mode == "online" and not _has_key():
            log.warning("W&B: no API key is configured (run wandb login), so this run is logged offline")
            mode = "offline"
        self._run = None
        if mode != "disabled":
            identity = {"project": project, "entity": entity, "id": run_id, "name": str(config.get("name", run_id))}
            self._run = _start(mode, self.folder, identity, config)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._send(step, dict(metrics), commit=False)

    def show(self, step: int, evaluation: Evaluation) -> None:
        """Also commits the row of this step, which W&B would otherwise keep until the next step."""
        if self._run is None:
            return
        import wandb

        pictures = {
            f"pictures/{picture.name}": wandb.Image(picture.pixels.cpu().numpy(), caption=picture.caption or None)
            for picture in evaluation.pictures
        }
        with _staging_folder(self.folder / "wandb" / "data"):
            tables = {f"tables/{t.name}": _wandb_table(t) for t in evaluation.tables}
            self._send(step, pictures | tables, commit=True)

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Log a table of text and numbers as NAME, and commit the row of this step."""
        import wandb

        with _staging_folder(self.folder / "wandb" / "data"):
            self._send(step, {name: wandb.Table(columns=list(columns), data=[list(row) for row in rows])}, commit=True)

    def close(self, status: str) -> None:
        if self._run is None:
            return
        with self._disabled_on_error():
            self._run.summary["status"] = status
            self._run.finish(exit_code=EXIT_CODES[status])
        self._run = None

    def _send(self, step: int, values: dict[str, Any], commit: bool) -> None:
        if self._run is not None:
            with self._disabled_on_error():
                self._run.log(values, step=step, commit=commit)

    @contextmanager
    def _disabled_on_error(self) -> Iterator[None]:
        """If W&B fails, stop logging to it with a warning, but not the training."""
        import wandb

        try:
            yield
        except (ConnectionError, wandb.Error) as error:
            self._run = None
            log.warning("W&B failed (%s) and is no longer used; metrics.jsonl and report.html are still written", error)


def _start(mode: Any, folder: Path, identity: dict[str, Any], config: Mapping[str, Any]) -> Any:
    import wandb

    folder.mkdir(parents=True, exist_ok=True)
    settings = SECONDS | QUIET | {"x_disable_stats": mode != "online", "x_disable_machine_info": mode != "online"}
    fields = wandb.Settings.model_fields  # other versions of W&B may lack some
    supported: dict[str, Any] = {name: value for name, value in settings.items() if name in fields}
    arguments = identity | {"dir": str(folder), "config": dict(config), "resume": "allow"}
    try:
        run = wandb.init(mode=mode, settings=wandb.Settings(**supported), **arguments)
    except wandb.Error as error:
        if mode == "offline":
            raise RuntimeError(f"W&B could not write to {folder}/wandb: {error}; use logger=none") from error
        log.warning("W&B cannot be reached (%s): this run is logged offline", error)
        wandb.teardown()  # its process would refuse a second run with the same id
        run = wandb.init(mode="offline", settings=wandb.Settings(**supported), **arguments)
    if run.settings.mode == "online":
        log.info("W&B: %s", run.url)
    else:
        log.info("W&B: offline; to upload it later: wandb sync %s", run.settings.sync_dir)
    return run


def _has_key() -> bool:
    """True if W&B finds an API key without a prompt: in the environment or in the netrc file."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    import wandb

    hosts = {urlsplit(wandb.setup().settings.base_url).netloc, "api.wandb.ai"}
    for path in filter(None, (os.environ.get("NETRC"), "~/.netrc", "~/_netrc")):
        try:
            if hosts & netrc.netrc(Path(path).expanduser()).hosts.keys():
                return True
        except FileNotFoundError:
            continue
        except (OSError, netrc.NetrcParseError) as error:
            log.warning("W&B: %s cannot be read (%s), so no key is taken from it", Path(path).expanduser(), error)
    return False


@contextmanager
def _staging_folder(folder: Path) -> Iterator[None]:
    """Stage thumbnails of tables in `folder`, not in the home directory, so that they move with the run folder."""
    previous = os.environ.get("WANDB_DATA_DIR")
    os.environ["WANDB_DATA_DIR"] = previous or str(folder)
    try:
        yield
    finally:
        if previous is None:
            del os.environ["WANDB_DATA_DIR"]


def _wandb_table(table: EmbeddingTable) -> Any:
    """Rows of thumbnail, label and embedding, for W&B's 2D projector."""
    import wandb

    vectors = table.vectors.cpu().numpy().astype(np.float64).round(4)  # float32 would be printed with 17 digits
    thumbnails = _rgb(table.thumbnails).permute(0, 2, 3, 1).cpu().numpy()  # [n, h, w, 3]
    rows = zip(map(wandb.Image, thumbnails), table.labels, vectors, strict=True)
    wandb_table = wandb.Table(columns=["thumbnail", "label", "embedding"], data=[list(row) for row in rows])
    wandb_table._MAX_EMBEDDING_DIMENSIONS = vectors.shape[1]  # W&B moves wider arrays into an npz file
    return wandb_table


def _rgb(images: Tensor) -> Tensor:
    """uint8 [n, C, h, w] -> [n, 3, h, w]; unless C is 3, the first channel in grey."""
    return images if images.shape[1] == 3 else images[:, :1].expand(-1, 3, -1, -1)


class TensorboardLogger:
    """Logs to TensorBoard in FOLDER/tensorboard: scalars, images and the embedding projector."""

    requires = ("tensorboard", "tensorboard")

    def __init__(self, *, folder: Path, config: Mapping[str, Any], run_id: str, resume_step: int | None) -> None:
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ModuleNotFoundError as error:
            raise ValueError("logger=tensorboard needs an extra: pip install 'jepa-train[tensorboard]'") from error
        first_step = 0 if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(str(Path(folder) / "tensorboard"), purge_step=first_step)
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
