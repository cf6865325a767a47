"""The Python API, and the training of one configuration, which the command line runs too."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jepa.config import (
    Composer,
    ConfigError,
    TrainConfig,
    as_config_errors,
    compose_embed,
    compose_eval,
    compose_plan,
    factory,
    override_literal,
    to_dataclass,
    to_yaml,
)
from jepa.config.attributes import JEPAConfig
from jepa.config.finetuning import to_train_arguments
from jepa.config.machine import check_costly_default
from jepa.config.paths import content
from jepa.data.decode import ImageSource
from jepa.data.loader import killed_worker
from jepa.encoders.pretrained import open_encoder
from jepa.errors import RunError
from jepa.inference.feature_file import FeatureFile, read_features
from jepa.inference.finetuned import Finetuned, Prediction, load_finetuned
from jepa.parallel.device import total_memory
from jepa.parallel.environment import requeue
from jepa.parallel.session import Session, forward_failures, open_distributed_session
from jepa.parallel.signals import FROM_SCHEDULERS, SIGNALS, Interrupt, handlers, listen
from jepa.planning.fit import fit_heads
from jepa.planning.goal_planner import GoalPlanner
from jepa.planning.world import load_world
from jepa.reports.console import closing_lines, opening_lines
from jepa.reports.run import final_table, write_report
from jepa.reports.text import printable
from jepa.reports.verdict import initial_weights, verdict
from jepa.resources.advice import memory_advice
from jepa.resources.measured import describe_cost
from jepa.resources.threads import settle_threads
from jepa.runs import checkpoint
from jepa.runs.folder import RunFolder, open_folder
from jepa.runs.metrics import read_config, read_ending, read_json, read_rows
from jepa.training.assemble import Phase, assemble, data_identity, log_survey, make_dataset, make_loggers, phases_left
from jepa.training.launch import num_processes, start_processes
from jepa.training.run import Run

__all__ = ["JEPAAgent", "JEPAConfig", "load_encoder", "load_finetuned", "load_planner", "load_world"]


class JEPAAgent:
    """A run: it is trained, evaluated, fine-tuned, exported, and its encoder and head are used.

    `config` is a JEPAConfig or a checked TrainConfig, whose run folder is `folder`, by default outputs/NAME; or the
    path of an existing run folder. Methods take overrides as the commands of the same name do; `evaluate` and
    `finetune` use the data set of the run if these name none. Raises ConfigError with all errors at once.
    """

    def __init__(
        self, config: JEPAConfig | TrainConfig | str | os.PathLike, folder: str | os.PathLike | None = None
    ) -> None:
        if isinstance(config, JEPAConfig | TrainConfig):
            self.config = config.compose(folder) if isinstance(config, JEPAConfig) else config
            self._typed = config.overrides if isinstance(config, JEPAConfig) else None
            self.folder = Path(folder) if folder is not None else Path("outputs") / self.config.name
            return
        self._typed = None
        self.folder = Path(config).expanduser()
        if folder is not None or not (self.folder / "config.yaml").is_file():
            what = f"is a run folder itself; leave folder={folder} out" if folder is not None else "holds no run"
            raise ConfigError([f"{self.folder} {what}; {content(self.folder.absolute())}"])

    @cached_property
    def config(self) -> TrainConfig:
        """The configuration of an existing run, checked as a new one: its data must be there."""
        return to_dataclass(Composer(self.folder, "config").compose(["resume=true"]))

    @property
    def history(self) -> list[dict[str, float]]:
        """The rows of metrics.jsonl: step, samples, train/loss, probe/linear_top1 ..., each where it was measured."""
        return read_rows(self.folder)

    def train(self) -> dict[str, float]:
        """Train to the end, resuming a run in the run folder; returns the last value of every metric."""
        for name in ("encoder", "finetuned"):
            self.__dict__.pop(name, None)  # cached before this training
        check_costly_default(self.config, self._typed, self.folder)
        print("".join(opening_lines(asdict(self.config), self.folder)), end="", file=sys.stderr, flush=True)
        status = train(self.config, self.folder)
        if status and status - 128 not in SIGNALS:
            raise RunError(f"{self.folder}: the processes of the run ended with status {status}; see their messages")
        return {name: value for row in read_rows(self.folder) for name, value in row.items()}

    @cached_property
    def encoder(self) -> nn.Module:
        """The encoder in the run folder, in eval mode; see `load_encoder`."""
        return load_encoder(self.folder)

    @cached_property
    def finetuned(self) -> Finetuned:
        """Encoder and head of a fine-tuned run; see `load_finetuned`."""
        return load_finetuned(self.folder)

    @torch.no_grad()
    def encode(self, images: ImageSource | Sequence[ImageSource]) -> Tensor:
        """Images, clips [B, C, T, H, W], or a list of either, of any sizes -> mean tokens [B, D]; see EvalTransform."""
        encoder: Any = self.encoder
        return encoder(encoder.transform(images)).mean(dim=1)

    def predict(
        self, images: ImageSource | Sequence[ImageSource], *, top: int = 1, min_score: float = 0.5
    ) -> list[list[Prediction]]:
        """Classes or boxes that the head of a fine-tuned run finds in each image; see `Finetuned.predict`."""
        return self.finetuned.predict(images, top=top, min_score=min_score)

    def evaluate(self, *overrides: str) -> list[dict[str, Any]]:
        """The rows of `jepa-eval` with these overrides: title, column (the task), top1, low, high ...; it prints them.

        The results are in outputs/eval-NAME, unless name= is given, and are not computed again.
        """
        from jepa.benchmark.protocol import evaluate

        config = compose_eval([f"name={override_literal(f'eval-{self.folder.name}')}", self._run, *overrides])
        return read_json(evaluate(config) / "eval.json").get("rows", [])

    def finetune(self, *overrides: str) -> JEPAAgent:
        """Train encoder and head on labels, as `jepa-finetune` with these overrides; returns the new run.

        It is outputs/NAME-tuned, unless name= is given, and is resumed if it is there.
        """
        name = f"name={override_literal(f'{self.folder.name}-tuned')}"
        arguments = to_train_arguments([name, self._run, *overrides])
        tuned = JEPAAgent(to_dataclass(Composer(config_name="finetune").compose(arguments)))
        tuned.train()
        return tuned

    def export(self, format: str = "safetensors", output: str | os.PathLike | None = None) -> Path:
        """The folder into which the encoder, without a head, is exported; by default export/FORMAT in the run."""
        from jepa.exporters.export import export_encoder

        return export_encoder(self.folder, format, output or self.folder / "export" / format).folder

    def embed(self, *overrides: str) -> FeatureFile:
        """The features of files, as `jepa-embed` with these overrides: names, array [n, D] and facts.

        The file is features.npz in the run folder, unless out= is given.
        """
        from jepa.inference.embed import Embedding

        out = f"out={override_literal(self.folder / 'features.npz')}"
        embedding = Embedding(compose_embed([out, self._run, *overrides]))
        embedding.write()
        return read_features(embedding.target)

    @property
    def _run(self) -> str:
        return f"run={override_literal(self.folder)}"


def load_encoder(path_or_name: str | os.PathLike) -> nn.Module:
    """An encoder of a run folder, of published weights or of timm, in eval mode, on the CPU.

    Of a fine-tuned run it is the encoder without the head, which `load_finetuned` loads with it.

    Maps clips [B, C, T, H, W] or images [B, C, H, W] to tokens [B, N, D]; `.transform` makes such clips from uint8
    tensors and arrays, images of Pillow and paths, of any size, `.embed_dim` is D. See `open_encoder` for the sources.
    Raises CheckpointError for a source that is damaged or holds no encoder. Only encoders of this package and of timm
    are built, so that no file can run code.
    """
    return open_encoder(path_or_name)


def load_planner(
    planner: str = "cem", cost: str | Sequence[str] | None = None, *, overrides: Sequence[str] = ()
) -> Any:
    """A planner of conf/planner with costs of conf/cost: `plan(world, goal, frame)` returns actions.

    None takes the planner's own cost, which is gc_value for most.
    `overrides` are those of jepa-plan, as planner.horizon=24. Raises ConfigError for unknown names and wrong values.
    """
    costs = [cost] if isinstance(cost, str) else cost
    choices = [f"planner={planner}", *([f"cost=[{','.join(costs)}]"] if costs else [])]
    config = compose_plan(["experiment=two_rooms", *choices, *overrides])  # jepa-plan would need an experiment or a run
    return GoalPlanner(factory(config.planner)(), {name: factory(node)() for name, node in config.cost.items()})


def train(config: TrainConfig, folder: Path, interrupt: Interrupt | None = None) -> int:
    """Train `config` in `folder`; returns 0 if the run is finished, 128 plus the signal if a signal stopped it.

    Starts a process for each GPU, or joins the processes that torchrun or srun has started. `interrupt` holds a signal
    received earlier, if any.
    """
    count = num_processes(config, os.environ)
    if count > 1:
        return start_processes(config, folder, count)
    opened = open_distributed_session(
        device=config.device, precision=config.precision, strategy=config.strategy, environ=os.environ
    )
    with (
        opened as session,
        open_folder(folder, config=asdict(config), resume=config.resume, session=session) as run_dir,
    ):
        if run_dir.status == "finished":
            if session.is_rank_zero:
                _fit_heads(config, folder)
                print(printable(f"{folder} is finished; for another run give another name=\n{_summary(folder)}"))
            return 0
        with listen(interrupt, FROM_SCHEDULERS) as interrupt:
            signum = _train(config, run_dir, interrupt, session)
        if session.is_rank_zero and not signum:
            _fit_heads(config, folder)
        with handlers(FROM_SCHEDULERS if signum else (), signal.SIG_DFL):  # everything is saved: Slurm may kill it
            if session.is_rank_zero:
                print(printable(_summary(folder)), flush=True)
            if session.is_rank_zero and signum in FROM_SCHEDULERS:
                requeue(os.environ)
            session.gather(None)  # a rank that exits earlier, with a status, would end rank 0
    return 128 + signum if signum else 0


def _train(config: TrainConfig, folder: RunFolder, interrupt: Interrupt, session: Session) -> int:
    """Train the remaining phases; returns the signal that stopped the run, 0 if it is finished."""
    with as_config_errors():
        dataset = make_dataset(config)
        data = session.broadcast_from_rank_zero(partial(data_identity, dataset, folder.path))
        phases = phases_left(config, len(dataset), folder.path)
        if phases[0].config.num_frames != config.num_frames:
            dataset = make_dataset(phases[0].config)
        if session.is_rank_zero:
            log_survey(config, dataset)
        run = assemble(phases[0], dataset, folder.path, session)
        run.facts["data"] = data
        threads = settle_threads(config.threads, run)
        if session.is_rank_zero and threads:
            print(threads, file=sys.stderr, flush=True)
        run.loggers = make_loggers(config, folder, session) if session.is_rank_zero else []
    with listen(interrupt):  # until here nothing had to be saved
        folder.begin(to_yaml(config))
        stopped_by = 0
        try:
            if not _train_phases(phases, run, folder.path, interrupt):
                stopped_by = interrupt.signum_on_all_ranks
        finally:
            with suppress(*[OSError] if sys.exc_info()[1] else []):  # of a full disk, which the error in flight names
                _close(folder, run, stopped_by)
    return stopped_by


def _train_phases(phases: Sequence[Phase], run: Run, folder: Path, interrupt: Interrupt) -> bool:
    """Train the phases, the first one with `run`; True if all are finished."""
    for phase in phases:
        run = run if phase is phases[0] else _next_phase(phase, folder, run)
        cost = describe_cost(run.plan, run.components, run.snapshotter, run.broken.dataset)
        if run.session.is_rank_zero:
            print(cost, file=sys.stderr, flush=True)
        with forward_failures(run.session), _out_of_memory_advice(phase.config, run):
            step = run.train(interrupt)
        if step < phase.end_step or run.lacks_evaluation(step):
            return False
    return True


def _fit_heads(config: TrainConfig, folder: Path) -> None:
    """Fit the heads of a world model that are named in the configuration and not yet in the run folder."""
    if names := config.objective.get("heads"):
        with as_config_errors():
            dataset: Any = make_dataset(config)
            names_of = {"num_steps": "head_steps", "max_frames": "head_frames", "gamma": "head_gamma"}
            chosen = {name: config.objective[key] for name, key in names_of.items() if key in config.objective}
            fit_heads(folder, dataset.store, names, **chosen, num_episodes=len(dataset.numbers), seed=config.seed)


def _close(folder: RunFolder, run: Run, stopped_by: int) -> None:
    folder.end(stopped_by)
    for logger in run.loggers:
        logger.close(folder.status)
    if run.session.is_rank_zero:
        write_report(folder.path)


def _next_phase(phase: Phase, folder: Path, previous: Run) -> Run:
    """The run with the sizes of another phase; it starts from the last checkpoint of the previous phase."""
    with as_config_errors():
        run = assemble(phase, make_dataset(phase.config), folder, previous.session)
    run.loggers = previous.loggers
    run.facts |= {name: previous.facts[name] for name in ("data", "threads") if name in previous.facts}
    return run


@contextmanager
def _out_of_memory_advice(config: TrainConfig, run: Run) -> Iterator[None]:
    """Replaces the error of memory that ran out, or of a killed worker, by one that says which keys to change."""
    try:
        yield
    except RuntimeError as error:
        if killed := killed_worker(error):
            raise killed from error
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        device, dataset = run.session.device, run.broken.dataset
        raise RunError(memory_advice(config, dataset, run.session, total_memory(device))) from error


def _summary(folder: Path) -> str:
    """The last metrics, the verdict on the run, the path of its report, and what to do next if it is finished."""
    rows, config = read_rows(folder), read_config(folder)
    start = initial_weights(config)
    result = verdict(rows, start)
    lines = [
        final_table(rows, start).terminal(),
        f"{result.word}: {result.reason}",
        f"report: {folder / 'report.html'}",
    ]
    if read_ending(folder).get("status") == "finished":
        lines += closing_lines(config, folder)
    elif last := checkpoint.latest(folder):
        step = checkpoint.peek(last)["step"]
        lines.append(f"stopped; step {step:,} is saved in {folder / 'checkpoints'}, and the same command goes on")
    else:
        lines.append("stopped before the first step was saved; the same command starts again")
    return "\n".join(lines)
