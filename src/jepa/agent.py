"""The Python API, and what the command line runs: one path through one configuration."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jepa.config import TrainConfig, as_config_errors, to_yaml
from jepa.config.attributes import JEPAConfig
from jepa.encoders.pretrained import open_encoder
from jepa.errors import RunError
from jepa.parallel.device import total_memory
from jepa.parallel.environment import requeue
from jepa.parallel.session import Session, forward_failures, open_distributed_session
from jepa.parallel.signals import FROM_SCHEDULERS, SIGNALS, Interrupt, handlers, listen
from jepa.reports.run import final_table, write_report
from jepa.reports.verdict import initial_weights, verdict
from jepa.resources.advice import memory_advice
from jepa.resources.measured import describe_cost
from jepa.runs.folder import RunFolder, open_folder
from jepa.runs.metrics import read_config, read_rows
from jepa.training.assemble import Phase, assemble, make_dataset, make_loggers, phases_left
from jepa.training.launch import num_processes, start_processes
from jepa.training.run import Run

__all__ = ["JEPAAgent", "JEPAConfig", "load_encoder"]


class JEPAAgent:
    """Trains what a configuration describes and encodes images or clips with the result.

    `config` is a JEPAConfig or an already checked TrainConfig; the run lives in `folder`, outputs/NAME by default.
    Raises ConfigError with all faults at once.
    """

    def __init__(self, config: JEPAConfig | TrainConfig, folder: str | os.PathLike | None = None) -> None:
        self.config = config.compose() if isinstance(config, JEPAConfig) else config
        self.folder = Path(folder) if folder is not None else Path("outputs") / self.config.name
        self._encoder: nn.Module | None = None

    def train(self) -> dict[str, float]:
        """Train to the end, resuming what is in the run folder; returns the last value of every metric."""
        self._encoder = None
        status = train(self.config, self.folder)
        if status and status - 128 not in SIGNALS:
            raise RunError(f"{self.folder}: the processes of the run ended with status {status}, and have said why")
        return {name: value for row in read_rows(self.folder) for name, value in row.items()}

    @property
    def encoder(self) -> nn.Module:
        """The encoder that was trained in the run folder, in eval mode; see `load_encoder`."""
        if self._encoder is None:
            self._encoder = load_encoder(self.folder)
        return self._encoder

    @torch.no_grad()
    def encode(self, images: Tensor | Sequence[Tensor]) -> Tensor:
        """uint8 [B, C, H, W], clips [B, C, T, H, W], or a list of either, of any sizes -> [B, D], the mean token."""
        encoder: Any = self.encoder
        return encoder(encoder.transform(images)).mean(dim=1)


def load_encoder(path_or_name: str | os.PathLike) -> nn.Module:
    """Any encoder, in eval mode, on the CPU: what was trained in a run folder, published weights, a model of timm.

    Maps clips [B, C, T, H, W] or images [B, C, H, W] to tokens [B, N, D]; `.transform` makes such clips from uint8
    images of any size, `.embed_dim` is D. See `open_encoder` for the sources. Raises CheckpointError for what is
    damaged or no encoder. Only encoders of this package and of timm are built, so that no file can name code to run.
    """
    return open_encoder(path_or_name)


def train(config: TrainConfig, folder: Path, interrupt: Interrupt | None = None) -> int:
    """Run `config` in `folder`; 0 when it is finished, 128 plus the signal when a signal stopped it.

    Alone, with as many processes as there are GPUs, or as one of those that torchrun or srun has started. `interrupt`
    holds a signal that has come before, if any.
    """
    count = num_processes(config, os.environ)
    if count > 1:
        return start_processes(config, folder, count)
    meeting = open_distributed_session(
        device=config.device, precision=config.precision, strategy=config.strategy, environ=os.environ
    )
    with meeting as here, open_folder(folder, config=asdict(config), resume=config.resume, session=here) as run_folder:
        if run_folder.status == "finished":
            if here.is_rank_zero:
                print(f"{folder} is finished; for another run give another name=\n{_closing(folder)}")
            return 0
        with listen(interrupt) as interrupt:
            signum = _train(config, run_folder, interrupt, here)
        with handlers(FROM_SCHEDULERS if signum else (), signal.SIG_DFL):  # all is saved: Slurm may end it
            if here.is_rank_zero:
                print(_closing(folder), flush=True)
            if here.is_rank_zero and signum in FROM_SCHEDULERS:
                requeue(os.environ)
            here.gather(None)  # none leaves with a status that ends the others before rank 0 is done
    return 128 + signum if signum else 0


def _train(config: TrainConfig, folder: RunFolder, interrupt: Interrupt, here: Session) -> int:
    """The phases that are left, one after the other; the signal that stopped the run, 0 when it is finished."""
    with as_config_errors():
        dataset = make_dataset(config)
        phases = phases_left(config, len(dataset), folder.path)
        if phases[0].config.num_frames != config.num_frames:
            dataset = make_dataset(phases[0].config)
        run = assemble(phases[0], dataset, folder.path, here)
        run.loggers = make_loggers(config, folder) if here.is_rank_zero else []
    folder.begin(to_yaml(config))
    stopped_by = 0
    try:
        for phase in phases:
            run = run if phase is phases[0] else _next_phase(phase, folder.path, run)
            cost = describe_cost(run.plan, run.components, run.snapshotter)
            if here.is_rank_zero:
                print(cost, file=sys.stderr, flush=True)
            with forward_failures(here), _advising(phase.config, run):
                done = run.train(interrupt)
            if done < phase.end_step or run.lacks_evaluation(done):
                stopped_by = interrupt.signum_on_all_ranks
                break
    finally:
        folder.end(stopped_by)
        for logger in run.loggers:
            logger.close(folder.status)
        if here.is_rank_zero:
            write_report(folder.path)
    return stopped_by


def _next_phase(phase: Phase, folder: Path, before: Run) -> Run:
    """Parts of other sizes; they take over the weights from the checkpoint that the phase before left."""
    with as_config_errors():
        run = assemble(phase, make_dataset(phase.config), folder, before.session)
    run.loggers = before.loggers
    return run


@contextmanager
def _advising(config: TrainConfig, run: Run) -> Iterator[None]:
    """What to change where memory runs out."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        device, dataset = run.session.device, run.broken.dataset
        raise RunError(memory_advice(config, dataset, run.session, total_memory(device))) from error


def _closing(folder: Path) -> str:
    rows = read_rows(folder)
    start = initial_weights(read_config(folder))
    judged = verdict(rows, start)
    return f"{final_table(rows, start).terminal()}\n{judged.word}: {judged.reason}\nreport: {folder / 'report.html'}"
