"""What several processes, checkpoints and the start of a run cost; part of scripts/bench.py."""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as multiprocessing

from jepa.config import TrainConfig
from jepa.data.loader import batches
from jepa.parallel.session import Session, open_distributed_session
from jepa.runs import checkpoint
from jepa.training.assemble import make_components, make_dataset, make_plan, split_phases
from jepa.training.loop import Plan, TrainComponents, one_step

RANKS = 2


def measure_processes(config: TrainConfig, overrides: Sequence[str], num_steps: int) -> dict[str, Any]:
    """Ratios of steps taken in turns, milliseconds that a save holds up the training, seconds to the first step."""
    return {
        "step_ratio_of_two_ranks": {
            strategy: _strategy_ratio(config, strategy, num_steps) for strategy in ("ddp", "fsdp")
        },
        "save": measure_saves(config, num_steps),
        "seconds_to_first_step": round(statistics.median(_seconds_to_first_step(overrides) for _ in range(3)), 1),
    }


def _strategy_ratio(config: TrainConfig, strategy: str, num_steps: int) -> float:
    """Of a step that two ranks take together over the same step that each takes alone: the cost of communication."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        arguments = config, strategy, num_steps, port, f"{folder}/ratio"
        multiprocessing.spawn(_rank, args=arguments, nprocs=RANKS)  # pyright: ignore[reportPrivateImportUsage]
        return float(Path(f"{folder}/ratio").read_text())


def _rank(rank: int, config: TrainConfig, strategy: str, num_steps: int, port: int, ratio_file: str) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // RANKS))
    environ = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS}
    environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in environ.items()})
    with open_distributed_session(device="cpu", precision="fp32", strategy=strategy, environ=os.environ) as session:
        together = _stepper(config, session)
        alone = _stepper(config, Session(session.device, session.bf16), share=RANKS)
        ratios = []
        for step in range(num_steps + 1):
            session.gather(None)
            ratios.append(together(step) / alone(step))
        if session.is_rank_zero:
            Path(ratio_file).write_text(f"{statistics.median(ratios[1:]):.3f}")


def _stepper(config: TrainConfig, session: Session, share: int = 1) -> Callable[[int], float]:
    """Takes a step and tells its seconds; `share` is by how much the batch is smaller."""
    plan, components = _components(config, session, share)
    raw = next(batches(make_dataset(config), batch_size=plan.batch_size // session.world_size, seed=0, num_workers=0))

    def step(number: int) -> float:
        begun = time.perf_counter()
        one_step(plan, components, raw, number)
        return time.perf_counter() - begun

    return step


def _components(config: TrainConfig, session: Session, share: int = 1) -> tuple[Plan, TrainComponents]:
    dataset = make_dataset(config)
    plan = make_plan(split_phases(config, len(dataset))[0], len(dataset), session.world_size)
    if share > 1:
        size = plan.batch_size // share
        plan = Plan(**vars(plan) | {"batch_size": size, "micro_batch_size": min(size, plan.micro_batch_size)})
    return plan, make_components(config, dataset, plan, session)


def measure_saves(config: TrainConfig, num_saves: int) -> dict[str, Any]:
    """Milliseconds until the training goes on, in turns with and without a copy, and until the checkpoint is whole."""
    session = Session(torch.device("cpu"), bf16=False)
    _, components = _components(config, session)
    tensors = _with_moments(components)
    held: dict[str, list[float]] = {"at once": [], "beside": [], "beside, whole after": []}
    with tempfile.TemporaryDirectory() as folder:
        writers = {flag: checkpoint.Writer(Path(folder), session, keep=1, asynchronous=flag) for flag in (False, True)}
        for number in range(2 * num_saves + 2):
            beside = number % 2 == 1
            begun = time.perf_counter()
            writers[beside].save(step=number, tensors=tensors, config="", state={})
            held["beside" if beside else "at once"].append(time.perf_counter() - begun)
            writers[beside].finish()
            if beside:
                held["beside, whole after"].append(time.perf_counter() - begun)
    size = sum(tensor.nbytes for tensor in tensors.values())
    times = {name: round(1000 * statistics.median(spent[1:])) for name, spent in held.items()}
    return {"megabytes": round(size / 1e6, 1), **{f"ms {name}": value for name, value in times.items()}}


def _with_moments(components: TrainComponents) -> dict[str, torch.Tensor]:
    tensors = checkpoint.training_tensors(components.objective, components.optimizer, None)
    for name, parameter in components.objective.named_parameters():
        if parameter.requires_grad:
            tensors |= {f"optimizer.{name}.{key}": torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
    return tensors


def _seconds_to_first_step(overrides: Sequence[str]) -> float:
    """Of `jepa-train` from the shell, without the evaluation of the untrained encoder."""
    own = ["steps=1", "evaluator=[]", "logger=none", "device=cpu", "name=start", "log_every=1"]
    with _away() as folder:
        begun = time.perf_counter()
        command = [sys.executable, "-m", "jepa.cli.train", *overrides, *own]
        with subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as run:
            assert run.stderr is not None
            first_steps = [time.perf_counter() - begun for line in run.stderr if line.startswith("step 1/")]
        if run.returncode or not first_steps:
            raise RuntimeError(f"{' '.join(command)} failed with status {run.returncode}")
        return first_steps[0]


@contextmanager
def _away() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        yield folder
